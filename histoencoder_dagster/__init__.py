"""The platform: the core's stages as Dagster assets, one partition a slide.

Assets hold no model or image code: each calls the stage of the core that has its name, slide by
slide, and tells in the web UI what a person wants to see. Files belong to the core's store; Dagster
owns what is known, what is due, in which order and where it runs.
"""
