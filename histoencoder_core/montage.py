"""Pictures of many tiles."""
