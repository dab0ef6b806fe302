"""Models out of other programs' configurations: what they say, as drafts of model files, and what they say in vain.

One module for each format; each has a function that takes what was read and returns an Import. What reads files beside
that says so. Nothing here writes any.
"""
