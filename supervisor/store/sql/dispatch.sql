-- name: needs
-- Interned needs after one; ids become visible in order.
SELECT n.id, n.kind, n.labels FROM bsup.need n WHERE n.id > $1 ORDER BY n.id;

-- name: claim
-- Leases what fits: $3 first counter, $4 slots free, $5 slots in all, $6 cpu free, $7 memory free, $8 needs; $9 and $10:
-- priority and job after which what lies beside is looked for first (256, 0: from the start).
-- The best of each need are locked (others' locks are passed over), merged in order of priority and age, and taken in
-- strict order up to the first that does not fit, so that a big job is not starved by small ones. A job that runs alone
-- weighs all slots. A job that this host could never take (more cpu or memory than it has) is not looked at.
-- leased_at is that of all, and told once.
-- No row: the session is not held. One row of nulls: nothing fits, or the session has expired and must be renewed first.
-- The session's row is locked against its reaper, who would otherwise miss the new leases.
-- OFFSET 0 keeps the join a look-up by primary key for each lease: the planner can't know how few they are, and would read
-- the whole table of jobs.
WITH me AS MATERIALIZED (
    SELECT s.id, s.cpu, s.memory, s.expires_at > bsup.clock() AS lives, bsup.clock() AS now
    FROM bsup.session s WHERE s.id = $1 AND s.incarnation = $2 AND s.dead_at IS NULL
    FOR KEY SHARE
), above AS MATERIALIZED (
    SELECT r.*
    FROM me
    CROSS JOIN unnest($8::integer[]) AS k (need_id)
    CROSS JOIN LATERAL (
        SELECT r.ctid AS at, r.job_id, r.memory, r.cpu, r.priority, r.alone
        FROM bsup.ready r
        WHERE r.need_id = k.need_id AND -r.priority < -$9::smallint
            AND (me.cpu IS NULL OR r.cpu <= me.cpu) AND (me.memory IS NULL OR r.memory <= me.memory)
        ORDER BY -r.priority, r.job_id
        LIMIT $4
        FOR UPDATE SKIP LOCKED
    ) r
    WHERE me.lives
), below AS MATERIALIZED (
    SELECT r.*
    FROM me
    CROSS JOIN unnest($8::integer[]) AS k (need_id)
    CROSS JOIN LATERAL (
        SELECT r.ctid AS at, r.job_id, r.memory, r.cpu, r.priority, r.alone
        FROM bsup.ready r
        WHERE r.need_id = k.need_id AND (-r.priority, r.job_id) > (-$9::smallint, $10::bigint)
            AND (me.cpu IS NULL OR r.cpu <= me.cpu) AND (me.memory IS NULL OR r.memory <= me.memory)
        ORDER BY -r.priority, r.job_id
        LIMIT $4
        FOR UPDATE SKIP LOCKED
    ) r
    WHERE me.lives AND (SELECT count(*) FROM above) < $4
), candidate AS NOT MATERIALIZED (
    SELECT * FROM above UNION ALL SELECT * FROM below
), weighed AS MATERIALIZED (
    SELECT coalesce(bool_or(c.alone OR c.cpu > 0 OR c.memory > 0), false) AS some FROM candidate c
), taken AS MATERIALIZED (
    -- Sums are dear, and most jobs weigh nothing but a slot.
    (SELECT c.at FROM candidate c WHERE NOT (SELECT w.some FROM weighed w) ORDER BY c.priority DESC, c.job_id LIMIT $4)
    UNION ALL
    (SELECT c.at
     FROM (
        SELECT c.at, sum(CASE WHEN c.alone THEN greatest($5::integer, 1) ELSE 1 END) OVER w AS slots_sum,
               sum(c.cpu::double precision) OVER w AS cpu_sum, sum(c.memory) OVER w AS memory_sum
        FROM candidate c WHERE (SELECT w.some FROM weighed w)
        WINDOW w AS (ORDER BY c.priority DESC, c.job_id ROWS UNBOUNDED PRECEDING)
     ) c
     WHERE c.slots_sum <= $4::integer
        AND ($6::double precision IS NULL OR c.cpu_sum <= $6::double precision + 0.000001)
        AND ($7::bigint IS NULL OR c.memory_sum <= $7::bigint))
), gone AS (
    DELETE FROM bsup.ready r WHERE r.ctid = ANY (ARRAY(SELECT t.at FROM taken t)) RETURNING r.*
), leased AS (
    INSERT INTO bsup.lease (session, counter, job_id, need_id, priority, loss_budget, cpu, memory, alone, generation, revision,
                            attempt, failures, losses, releases, ready_at, leased_at)
    SELECT me.id, $3::bigint - 1 + row_number() OVER (ORDER BY g.priority DESC, g.job_id), g.job_id, g.need_id, g.priority,
           g.loss_budget, g.cpu, g.memory, g.alone, g.generation, g.revision + 1, g.attempt + 1, g.failures, g.losses,
           g.releases, g.ready_at, me.now
    FROM me CROSS JOIN gone g
    RETURNING counter, job_id, attempt, failures, losses, leased_at, cpu, memory, alone, need_id, priority
)
SELECT l.counter, l.job_id, l.attempt, l.need_id, j.name, j.spec::text AS spec, j.attempts, l.failures, l.losses,
       CASE WHEN l.counter = $3 THEN l.leased_at END AS leased_at, l.cpu, l.memory, l.alone,
       CASE WHEN j.has_secrets THEN ARRAY(
           SELECT ARRAY[v.name, v.value, v.replacement] FROM bsup.job_secret v WHERE v.job_id = l.job_id
       ) END AS secrets, l.priority
FROM me
LEFT JOIN leased l ON true
LEFT JOIN LATERAL (
    SELECT j.name, j.spec, j.attempts, j.has_secrets FROM bsup.job j WHERE j.id = l.job_id OFFSET 0
) j ON true
ORDER BY l.counter;

-- name: set_idle
-- Says whether the host waits to be woken.
UPDATE bsup.session s SET idle = $3 WHERE s.id = $1 AND s.incarnation = $2 RETURNING s.id;

-- name: finish
-- Ends attempts; see bsup.finish_batch.
SELECT counter, recorded, state
FROM bsup.finish_batch($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15);

-- name: supersede
-- What the holder of a lease had that a reaper took: only where the attempt is its own and was written as lost.
WITH input AS MATERIALIZED (
    SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::integer[], $5::smallint[], $6::smallint[], $7::text[],
                         $8::text[], $9::timestamptz[], $10::timestamptz[])
        AS i (session, counter, job_id, attempt, exit_code, signal, error, reason, started, ended)
), kept AS (
    UPDATE bsup.attempt_row a
    SET outcome = 'superseded', exit_code = i.exit_code, signal = i.signal, error = i.error,
        reason = coalesce(i.reason, a.reason), started_at = coalesce(i.started, a.started_at),
        ended_at = coalesce(i.ended, a.ended_at)
    FROM input i
    WHERE a.job_id = i.job_id AND a.attempt = i.attempt AND a.session = i.session AND a.counter = i.counter
        AND a.outcome = 'lost'
    RETURNING a.job_id, a.attempt, a.session, a.counter, a.host
), told AS (
    INSERT INTO bsup.event (job_id, type, detail)
    SELECT k.job_id, 'superseded', jsonb_build_object('attempt', k.attempt, 'host', k.host) FROM kept k
)
INSERT INTO bsup.step (job_id, attempt, idx, name, state, exit_code, signal, started_at, ended_at, error)
SELECT k.job_id, k.attempt, s.index, s.name, s.state, s.exit_code, s.signal, s.started_at, s.ended_at, s.error
FROM jsonb_to_recordset($11::jsonb) AS s (session uuid, counter bigint, index smallint, name text, state text,
    exit_code smallint, signal smallint, started_at timestamptz, ended_at timestamptz, error text)
JOIN kept k ON k.session = s.session AND k.counter = s.counter
ON CONFLICT (job_id, attempt, idx) DO UPDATE SET
    name = excluded.name, state = excluded.state, exit_code = excluded.exit_code, signal = excluded.signal,
    started_at = excluded.started_at, ended_at = excluded.ended_at, error = excluded.error;

-- name: record_steps
-- Progress of running attempts. A step that has ended stays so: a completion may have overtaken this.
WITH me AS MATERIALIZED (
    SELECT s.id FROM bsup.session s WHERE s.id = $1 AND s.incarnation = $2
), written AS (
    INSERT INTO bsup.step (job_id, attempt, idx, name, state, exit_code, signal, started_at, ended_at, error)
    SELECT l.job_id, l.attempt, s.index, s.name, s.state, s.exit_code, s.signal, s.started_at, s.ended_at, s.error
    FROM me
    CROSS JOIN jsonb_to_recordset($3::jsonb) AS s (counter bigint, index smallint, name text, state text, exit_code smallint,
        signal smallint, started_at timestamptz, ended_at timestamptz, error text)
    JOIN bsup.lease l ON l.session = me.id AND l.counter = s.counter
    ON CONFLICT (job_id, attempt, idx) DO UPDATE SET
        name = excluded.name, state = excluded.state, exit_code = excluded.exit_code, signal = excluded.signal,
        started_at = excluded.started_at, ended_at = excluded.ended_at, error = excluded.error
    WHERE step.state IN ('pending', 'running')
)
SELECT me.id FROM me;
