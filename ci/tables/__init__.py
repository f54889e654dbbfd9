"""Tables of what works: by family, by older release, by newest release."""
