-- name: submit
-- Submits a job for a user of this host; see bsup.submit_as.
SELECT bsup.submit_as($1, $2, $3, $4);

-- name: submit_many
-- Submits jobs for a user of this host; see bsup.submit_many_as.
SELECT bsup.submit_many_as($1::jsonb, $2, $3);

-- name: matching_needs
-- Needs of these kinds ($1, empty: all) that ask for all of these labels ($2).
SELECT array_agg(n.id) FROM bsup.need n
WHERE (cardinality($1::text[]) = 0 OR n.kind = ANY ($1)) AND n.labels @> $2::text[];

-- name: list_jobs
-- A page of jobs older than id $1, newest first: $2 how many; $3 needs (null: any); $4 to $8 which states (waiting, ready,
-- running, succeeded, others that are final), $9 which of those others. Each branch walks its own primary key. Columns: the
-- fields of model.job.JobRow, in their order.
WITH page AS MATERIALIZED (
    (SELECT w.job_id FROM bsup.waiting w
     WHERE $4::boolean AND w.job_id < $1 AND ($3::integer[] IS NULL OR w.need_id = ANY ($3))
     ORDER BY w.job_id DESC LIMIT $2)
    UNION ALL
    (SELECT r.job_id FROM bsup.ready r
     WHERE $5::boolean AND r.job_id < $1 AND ($3::integer[] IS NULL OR r.need_id = ANY ($3))
     ORDER BY r.job_id DESC LIMIT $2)
    UNION ALL
    (SELECT l.job_id FROM bsup.lease l
     WHERE $6::boolean AND l.job_id < $1 AND ($3::integer[] IS NULL OR l.need_id = ANY ($3))
     ORDER BY l.job_id DESC LIMIT $2)
    UNION ALL
    (SELECT f.job_id FROM bsup.finished f
     WHERE $7::boolean AND f.job_id < $1 AND f.state = 'succeeded' AND f.retried_at IS NULL
        AND ($3::integer[] IS NULL OR f.need_id = ANY ($3))
     ORDER BY f.job_id DESC LIMIT $2)
    UNION ALL
    (SELECT f.job_id FROM bsup.finished f
     WHERE $8::boolean AND f.job_id < $1 AND f.state <> 'succeeded' AND f.state = ANY ($9::text[]) AND f.retried_at IS NULL
        AND ($3::integer[] IS NULL OR f.need_id = ANY ($3))
     ORDER BY f.job_id DESC LIMIT $2)
    ORDER BY job_id DESC LIMIT $2
)
SELECT v.id, v.name, v.kind, v.state, v.revision, v.generation, v.priority, v.labels, v.attempt, v.attempts, v.failures,
       v.losses, v.releases, v.submitted_at, v.submitter, v.ready_at, v.run_at, v.started_at, v.ended_at, v.host,
       replace(v.session::text, '-', '') || '-' || v.counter AS lease, v.exit_code, v.signal, v.error, v.reason,
       v.stop_asked_at, v.parents_left, v.step, v.step_name, v.steps_total
FROM bsup.jobs v WHERE v.id = ANY (ARRAY(SELECT p.job_id FROM page p)) ORDER BY v.id DESC;

-- name: list_lines
-- As list_jobs, with what a line of a list needs: half the columns, and no second look at the tables of the states. Columns:
-- the fields of model.job.JobLine, in their order.
WITH page AS MATERIALIZED (
    (SELECT w.job_id, 'waiting' AS state, w.need_id, w.attempt, w.parents_left, w.run_at, NULL::timestamptz AS started_at,
            NULL::timestamptz AS ended_at, NULL::uuid AS session, NULL::text AS host, NULL::smallint AS exit_code,
            NULL::smallint AS signal, NULL::text AS reason
     FROM bsup.waiting w
     WHERE $4::boolean AND w.job_id < $1 AND ($3::integer[] IS NULL OR w.need_id = ANY ($3))
     ORDER BY w.job_id DESC LIMIT $2)
    UNION ALL
    (SELECT r.job_id, 'ready', r.need_id, r.attempt, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL
     FROM bsup.ready r
     WHERE $5::boolean AND r.job_id < $1 AND ($3::integer[] IS NULL OR r.need_id = ANY ($3))
     ORDER BY r.job_id DESC LIMIT $2)
    UNION ALL
    (SELECT l.job_id, 'running', l.need_id, l.attempt, 0, NULL, l.leased_at, NULL, l.session, NULL, NULL, NULL, NULL
     FROM bsup.lease l
     WHERE $6::boolean AND l.job_id < $1 AND ($3::integer[] IS NULL OR l.need_id = ANY ($3))
     ORDER BY l.job_id DESC LIMIT $2)
    UNION ALL
    (SELECT f.job_id, f.state, f.need_id, f.attempt, 0, NULL, f.started_at, f.ended_at, NULL, f.host, f.exit_code, f.signal,
            f.reason
     FROM bsup.finished f
     WHERE $7::boolean AND f.job_id < $1 AND f.state = 'succeeded' AND f.retried_at IS NULL
        AND ($3::integer[] IS NULL OR f.need_id = ANY ($3))
     ORDER BY f.job_id DESC LIMIT $2)
    UNION ALL
    (SELECT f.job_id, f.state, f.need_id, f.attempt, 0, NULL, f.started_at, f.ended_at, NULL, f.host, f.exit_code, f.signal,
            f.reason
     FROM bsup.finished f
     WHERE $8::boolean AND f.job_id < $1 AND f.state <> 'succeeded' AND f.state = ANY ($9::text[]) AND f.retried_at IS NULL
        AND ($3::integer[] IS NULL OR f.need_id = ANY ($3))
     ORDER BY f.job_id DESC LIMIT $2)
    ORDER BY job_id DESC LIMIT $2
)
SELECT j.id, j.name, n.kind, p.state, p.attempt, CASE WHEN p.state = 'ready' THEN n.labels END AS labels, p.parents_left,
       p.run_at, greatest(0, trunc(date_part('epoch', (SELECT bsup.clock()) - j.submitted_at) * 1000) / 1000) AS age,
       CASE WHEN p.started_at IS NOT NULL THEN greatest(
           0, trunc(date_part('epoch', coalesce(p.ended_at, (SELECT bsup.clock())) - p.started_at) * 1000) / 1000
       ) END AS duration,
       coalesce(p.host, h.host) AS host, p.exit_code, p.signal, p.reason,
       CASE WHEN p.state = 'running' AND j.steps_total > 0 THEN (
           SELECT t.idx FROM bsup.step t
           WHERE t.job_id = j.id AND t.attempt = p.attempt AND t.state = 'running' ORDER BY t.idx DESC LIMIT 1
       ) END AS step,
       CASE WHEN p.state = 'running' AND j.steps_total > 0 THEN (
           SELECT t.name FROM bsup.step t
           WHERE t.job_id = j.id AND t.attempt = p.attempt AND t.state = 'running' ORDER BY t.idx DESC LIMIT 1
       ) END AS step_name,
       j.steps_total
FROM page p
JOIN bsup.job j ON j.id = p.job_id
JOIN bsup.need n ON n.id = j.need_id
LEFT JOIN bsup.session h ON h.id = p.session
ORDER BY j.id DESC;

-- name: job_rows
-- Jobs by id. Columns: the fields of model.job.JobRow, in their order.
SELECT v.id, v.name, v.kind, v.state, v.revision, v.generation, v.priority, v.labels, v.attempt, v.attempts, v.failures,
       v.losses, v.releases, v.submitted_at, v.submitter, v.ready_at, v.run_at, v.started_at, v.ended_at, v.host,
       replace(v.session::text, '-', '') || '-' || v.counter AS lease, v.exit_code, v.signal, v.error, v.reason,
       v.stop_asked_at, v.parents_left, v.step, v.step_name, v.steps_total
FROM bsup.jobs v WHERE v.id = ANY ($1::bigint[]);

-- name: show
-- A job's spec and its neighbours.
SELECT j.spec::text AS spec,
       ARRAY(SELECT e.parent FROM bsup.edge e WHERE e.child = j.id ORDER BY 1) AS parents,
       ARRAY(SELECT e.child FROM bsup.edge e WHERE e.parent = j.id ORDER BY 1) AS children
FROM bsup.job j WHERE j.id = $1;

-- name: attempts
-- A job's attempts, the running one last; one row of nulls if there was none yet.
SELECT t.*, coalesce(g.size, 0) AS log_bytes
FROM bsup.job j
LEFT JOIN (
    SELECT a.job_id, a.attempt, a.generation, a.host, a.session, a.counter, a.outcome, a.exit_code, a.signal, a.error,
           a.reason, a.started_at, a.ended_at
    FROM bsup.attempt a
    UNION ALL
    SELECT l.job_id, l.attempt, l.generation, coalesce(s.host, ''), l.session, l.counter, NULL, NULL, NULL, NULL, NULL,
           l.leased_at, NULL
    FROM bsup.lease l LEFT JOIN bsup.session s ON s.id = l.session
) t ON t.job_id = j.id
LEFT JOIN bsup.log g ON g.job_id = t.job_id AND g.attempt = t.attempt
WHERE j.id = $1
ORDER BY t.attempt;

-- name: steps
-- The steps of all of a job's attempts.
SELECT s.attempt, s.idx, s.name, s.state, s.exit_code, s.signal, s.started_at, s.ended_at, s.error
FROM bsup.step s WHERE s.job_id = $1 ORDER BY s.attempt, s.idx;

-- name: stop
-- Stops jobs; see bsup.stop_jobs.
SELECT job_id, did, is_over FROM bsup.stop_jobs($1, $2, $3, $4);

-- name: retry
-- Retries jobs; see bsup.retry_jobs.
SELECT bsup.retry_jobs($1, $2);

-- name: delete
-- Deletes jobs that ended; see bsup.delete_jobs.
SELECT bsup.delete_jobs($1, $2);

-- name: hosts
-- Sessions, with how many jobs each runs.
SELECT s.id, s.host, s.version, s.labels, s.slots, s.started_at, s.renewed_at, s.expires_at,
       (SELECT count(*) FROM bsup.lease l WHERE l.session = s.id) AS leases,
       CASE WHEN s.dead_at IS NOT NULL OR s.expires_at <= bsup.clock() THEN 'expired'
            WHEN s.draining THEN 'draining' ELSE 'active' END AS state
FROM bsup.session s ORDER BY s.host, s.started_at;

-- name: events
-- Events after one, in order. A transaction that is still under way may have taken a lower id: reading stops before the
-- first event that could overtake one, for up to a minute (a transaction open longer than that is not waited for).
SELECT e.id, e.at, e.job_id, e.type, e.detail::text AS detail
FROM bsup.event e
WHERE e.id > $1 AND e.id < coalesce((
    SELECT min(u.id) FROM bsup.event u
    WHERE u.id > $1 AND u.xid >= pg_snapshot_xmin(pg_current_snapshot())
        AND u.at > bsup.clock() - interval '1 minute'), 9223372036854775807)
ORDER BY e.id LIMIT $2;

-- name: last_event
-- The newest event's id.
SELECT coalesce(max(e.id), 0) FROM bsup.event e;
