"""What holds for all unit tests."""

from hypothesis import settings

# Time is no question of a unit test, least of all on a busy machine.
settings.register_profile("gpusvc", deadline=None, database=None)
settings.load_profile("gpusvc")
