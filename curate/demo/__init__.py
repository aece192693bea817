"""A rendered pool whose faults are known, and what that truth tells of a selection."""
