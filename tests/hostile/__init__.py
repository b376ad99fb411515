"""Hostile rows, files, names, models and templates with the outcomes that are right; bench/torture_parts tries them."""
