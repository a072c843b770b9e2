"""Makes ten million jobs of one, in SQL: every row that the job has, again for each new id. It knows which tables those
are from the catalog, so that it stays true when the schema changes."""

from __future__ import annotations

import asyncpg

SLICE = 1_000_000

COLUMNS = """
SELECT c.table_name, array_agg(c.column_name::text ORDER BY c.ordinal_position) AS names
FROM information_schema.columns c
JOIN information_schema.tables t USING (table_schema, table_name)
WHERE c.table_schema = 'bsup' AND t.table_type = 'BASE TABLE' AND c.is_generated = 'NEVER'
GROUP BY c.table_name
"""


async def multiply(connection: asyncpg.Connection, count: int) -> None:
    """Copies the one job that there is, whatever its state, ``count`` times, under ids that follow its own."""
    seed = await connection.fetchval("SELECT id FROM bsup.job")
    for start in range(1, count + 1, SLICE):
        last = min(start + SLICE - 1, count)
        for row in await connection.fetch(COLUMNS):
            table, names = row["table_name"], row["names"]
            key = "id" if table == "job" else "job_id"
            if key not in names:
                continue
            columns = ", ".join(names)
            values = ", ".join(f"t.{key} + n" if name == key else f"t.{name}" for name in names)
            await connection.execute(
                f"INSERT INTO bsup.{table} ({columns}) OVERRIDING SYSTEM VALUE "
                f"SELECT {values} FROM bsup.{table} t, generate_series({start}, {last}) AS n WHERE t.{key} = {seed}"
            )
    await connection.execute("SELECT setval(pg_get_serial_sequence('bsup.job', 'id'), max(id)) FROM bsup.job")
