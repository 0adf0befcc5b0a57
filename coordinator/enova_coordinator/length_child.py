"""The child process that learns limits on answers: as the policies', under a name of its own."""

from __future__ import annotations

from enova_coordinator.policy_child import main

if __name__ == "__main__":
    main()
