"""The adapter to PostgreSQL: the schema and its migrations, the store that ``ports`` promises, the embedded server.

The only package that uses asyncpg. May import ``model``, ``ports`` and anyio; never an actor or another adapter.
``pg`` has ``PgStore``, ``migrate`` the schema. Nothing is imported here: a command that needs no database starts fast.
"""
