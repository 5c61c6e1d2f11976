"""The stages of a run, one verb a file; the only home of Ray and MLflow."""

import os

if "RAY_ADDRESS" not in os.environ:
    # Ray inside one process listens on loopback only, as it does on other systems: its ports run whatever code reaches
    # them. Ray reads this when it is imported, so it is said before anything here can import it.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
