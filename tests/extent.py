"""How much the tests do."""

import os

FULL = bool(os.environ.get("TALLY_TEST_FULL"))
"""Storms as long as was promised, and every video: more than there is time for after each change."""
