"""Which section of the distribution a Debian package is in: a typed graph, and attention over its relations."""
