"""Tests that take minutes by nature, and print what they counted."""
