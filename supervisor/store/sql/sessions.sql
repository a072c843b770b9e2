-- name: open_session
-- Begins a session; its id and incarnation are the caller's. Adds the kinds ($13) that its host runs.
WITH kinds AS (
    INSERT INTO bsup.kind (name)
    SELECT k FROM unnest($13::text[]) k WHERE NOT EXISTS (SELECT FROM bsup.kind b WHERE b.name = k) ORDER BY k
    ON CONFLICT DO NOTHING
)
INSERT INTO bsup.session (id, incarnation, epoch, host, labels, slots, cpu, memory, version, machine_id, boot_id, pid, term,
                          started_at, renewed_at, expires_at)
SELECT $1, $2, 1, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, t.now, t.now, t.now + make_interval(secs => $12)
FROM (SELECT bsup.clock() AS now) t
RETURNING epoch;

-- name: resume_session
-- Compare-and-swap of the incarnation ($2 to $3) of a session that has not expired. A repeat of a swap that was made, but
-- whose answer was lost, finds $3 there. The epoch rises each time: nobody makes a lease id that another one made.
-- The lock waits for claims and completions of the daemon before that have begun (they hold the row's key): what this one
-- finds held is not ended by that one any more. A shorter term counts from the first renewal on, which comes after the fence:
-- until then jobs may run by the fence of the term before.
WITH held AS MATERIALIZED (
    SELECT s.id FROM bsup.session s
    WHERE s.id = $1 AND s.incarnation IN ($2, $3) AND s.dead_at IS NULL AND s.expires_at > bsup.clock()
    FOR UPDATE
), kept AS (
    UPDATE bsup.session s
    SET incarnation = $3, epoch = s.epoch + 1, host = $4, labels = $5, slots = $6,
        cpu = $7, memory = $8, version = $9, machine_id = $10, boot_id = $11, pid = $12, term = $13, idle = false,
        renewed_at = bsup.clock(), expires_at = greatest(s.expires_at, bsup.clock() + make_interval(secs => $13))
    FROM held h WHERE s.id = h.id
    RETURNING s.epoch
), kinds AS (
    INSERT INTO bsup.kind (name)
    SELECT k FROM kept, unnest($14::text[]) k WHERE NOT EXISTS (SELECT FROM bsup.kind b WHERE b.name = k) ORDER BY k
    ON CONFLICT DO NOTHING
)
SELECT k.epoch FROM kept k;

-- name: renew
-- Renews a session, whether or not it has expired, if no reaper has taken it; no row: it is gone. Says what it holds.
WITH me AS (
    UPDATE bsup.session s
    SET term = $3, draining = $4, renewed_at = bsup.clock(), expires_at = bsup.clock() + make_interval(secs => $3)
    WHERE s.id = $1 AND s.incarnation = $2 AND s.dead_at IS NULL
    RETURNING s.id
)
SELECT h.count, h.checksum, h.stop_counters, h.stop_jobs, h.stop_graces, h.stop_kills, h.stop_by
FROM me
CROSS JOIN LATERAL (
    SELECT count(*) AS count, coalesce(bit_xor(l.counter), 0) AS checksum,
           array_agg(l.counter ORDER BY l.counter) FILTER (WHERE l.stop_at IS NOT NULL) AS stop_counters,
           array_agg(l.job_id ORDER BY l.counter) FILTER (WHERE l.stop_at IS NOT NULL) AS stop_jobs,
           array_agg(l.stop_grace ORDER BY l.counter) FILTER (WHERE l.stop_at IS NOT NULL) AS stop_graces,
           array_agg(l.stop_kill ORDER BY l.counter) FILTER (WHERE l.stop_at IS NOT NULL) AS stop_kills,
           array_agg(coalesce(l.stop_by, '') ORDER BY l.counter) FILTER (WHERE l.stop_at IS NOT NULL) AS stop_by
    FROM bsup.lease l WHERE l.session = $1
) h;

-- name: stop_orders
-- The stops asked of a session's jobs, after one row that says that the session is held.
SELECT l.counter, l.job_id, l.stop_grace, l.stop_kill, coalesce(l.stop_by, '') AS stop_by
FROM bsup.session s
LEFT JOIN bsup.lease l ON l.session = s.id AND l.stop_at IS NOT NULL
WHERE s.id = $1 AND s.incarnation = $2
ORDER BY l.counter;

-- name: leases
-- All that a session holds, with what is needed to run it; one row of nulls if it holds nothing, none if it is not held.
SELECT l.counter, l.job_id, l.attempt, n.kind, j.name, j.spec::text AS spec, j.attempts, l.failures, l.losses, l.leased_at,
       l.cpu, l.memory, l.alone,
       CASE WHEN j.has_secrets THEN ARRAY(
           SELECT ARRAY[v.name, v.value, v.replacement] FROM bsup.job_secret v WHERE v.job_id = l.job_id
       ) END AS secrets
FROM bsup.session s
LEFT JOIN bsup.lease l ON l.session = s.id
LEFT JOIN bsup.job j ON j.id = l.job_id
LEFT JOIN bsup.need n ON n.id = l.need_id
WHERE s.id = $1 AND s.incarnation = $2
ORDER BY l.counter;

-- name: close_session
-- Ends a session; leases left are released. Returns how many could not be.
SELECT bsup.close_session($1, $2);

-- name: pulse
-- The database's sign of life (see bsup.beat), and whether there is anything for bsup.reap to do.
SELECT bsup.beat($1),
       EXISTS (SELECT FROM bsup.session s WHERE s.expires_at < (SELECT bsup.clock()))
       OR EXISTS (SELECT FROM bsup.waiting w WHERE w.run_at <= (SELECT bsup.clock()) AND w.parents_left = 0) AS is_due;

-- name: reap
-- One pass of the reaper; see bsup.reap.
SELECT requeued, failed, sessions, promoted, reap_not_before FROM bsup.reap($1);

-- name: sweep
-- Deletes jobs past their retention.
SELECT bsup.sweep($1, $2);
