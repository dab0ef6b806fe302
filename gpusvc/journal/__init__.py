"""What is written to the journal, and read back from it."""
