"""Test cases that run on both databases: each module here takes a `database` fixture, migrated and empty."""
