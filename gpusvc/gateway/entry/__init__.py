"""Who may send a request, and which model it names."""
