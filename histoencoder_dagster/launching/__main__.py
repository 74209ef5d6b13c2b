"""``python -m histoencoder_dagster.launching``, which the launcher calls: the forker."""

from histoencoder_dagster.launching.forker import main

if __name__ == "__main__":
    main()
