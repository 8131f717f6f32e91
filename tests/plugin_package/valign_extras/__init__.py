"""One method of each kind, as a package of its own adds them to valign."""
