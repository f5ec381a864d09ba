"""The code of a repository as memories."""
