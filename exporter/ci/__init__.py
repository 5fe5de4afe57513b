"""How a CI system is told: one format of annotations per file, and JUnit XML, which they all read."""
