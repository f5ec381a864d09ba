"""Text that is remembered, and the evidence in it found again."""
