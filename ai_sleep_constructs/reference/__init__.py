"""Models and text that every install has: the embedded reference model, loading any other one, and corpora."""
