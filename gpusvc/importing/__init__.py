"""Other programs' configurations as drafts of model files, with notes on what has no counterpart.

Each format has a module with a function that takes what was read and returns an Import. Functions that read files say
so. No module here writes a file.
"""
