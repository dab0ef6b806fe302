"""What may be wrong with a machine, and how to mend it: each module looks at one side of it."""
