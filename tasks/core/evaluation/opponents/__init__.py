"""Which runs a candidate is compared with: a name or none goes in, run folders come out, brought here from a URL."""
