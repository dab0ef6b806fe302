"""What holds for all unit tests."""

from hypothesis import HealthCheck, settings

# Time is no question of a unit test, least of all on a busy machine.
# The same examples each time, on a machine of any speed: a test that fails now and then tells nobody anything.
settings.register_profile(
    "gpusvc", deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("gpusvc")
