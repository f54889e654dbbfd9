"""Tables of what works: by family, by older release, by the newest."""
