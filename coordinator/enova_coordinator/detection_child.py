"""The child process that detection runs in: as the policies', under a name of its own, so that neither waits."""

from __future__ import annotations

from enova_coordinator.policy_child import main

if __name__ == "__main__":
    main()
