"""Write events and engine output to the journal, and read them back."""
