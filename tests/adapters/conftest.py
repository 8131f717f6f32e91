"""Lets the tests in the folders below import `networks`."""
