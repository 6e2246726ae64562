"""The database: engine and sessions for SQLite and PostgreSQL, migrations, and what is published to gateways."""
