"""Checks for attention modules, for use in tests."""
