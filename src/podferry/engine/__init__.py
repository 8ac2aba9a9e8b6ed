"""The two sides of one migration, told through ports: source, target, rounds, journal, record."""
