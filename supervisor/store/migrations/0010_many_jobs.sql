-- oldest: 9
-- Thousands of jobs at once: listed, and stopped.

-- As before, but a step is looked for only where a job that runs has steps.
CREATE OR REPLACE VIEW bsup.jobs AS
SELECT j.id, j.name, n.kind, s.state, s.revision, s.generation, j.priority, n.labels, s.attempt, j.attempts,
       s.failures, s.losses, s.releases, j.submitted_at, j.submitter, s.ready_at, s.run_at, s.started_at, s.ended_at,
       coalesce(s.host, h.host) AS host, s.session, s.counter, s.exit_code, s.signal, s.error, s.reason, s.stop_asked_at,
       s.parents_left,
       CASE WHEN s.state = 'running' AND j.steps_total > 0 THEN (
           SELECT t.idx FROM bsup.step t
           WHERE t.job_id = s.job_id AND t.attempt = s.attempt AND t.state = 'running' ORDER BY t.idx DESC LIMIT 1
       ) END AS step,
       CASE WHEN s.state = 'running' AND j.steps_total > 0 THEN (
           SELECT t.name FROM bsup.step t
           WHERE t.job_id = s.job_id AND t.attempt = s.attempt AND t.state = 'running' ORDER BY t.idx DESC LIMIT 1
       ) END AS step_name,
       j.steps_total
FROM bsup.job j
JOIN bsup.need n ON n.id = j.need_id
JOIN (
    SELECT w.job_id, 'waiting'::text AS state, w.revision, w.generation, w.attempt, w.failures, w.losses, w.releases,
           NULL::timestamptz AS ready_at, w.run_at, NULL::timestamptz AS started_at, NULL::timestamptz AS ended_at,
           NULL::text AS host, NULL::uuid AS session, NULL::bigint AS counter, NULL::smallint AS exit_code,
           NULL::smallint AS signal, NULL::text AS error, NULL::text AS reason, NULL::timestamptz AS stop_asked_at,
           w.parents_left, NULL::timestamptz AS retried_at
    FROM bsup.waiting w
    UNION ALL
    SELECT r.job_id, 'ready', r.revision, r.generation, r.attempt, r.failures, r.losses, r.releases,
           r.ready_at, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, NULL
    FROM bsup.ready r
    UNION ALL
    SELECT l.job_id, 'running', l.revision, l.generation, l.attempt, l.failures, l.losses, l.releases,
           l.ready_at, NULL, l.leased_at, NULL, NULL, l.session, l.counter, NULL, NULL, NULL, NULL, l.stop_at, 0, NULL
    FROM bsup.lease l
    UNION ALL
    SELECT f.job_id, f.state, f.revision, f.generation, f.attempt, f.failures, f.losses, f.releases,
           NULL, NULL, f.started_at, f.ended_at, f.host, f.session, f.counter, f.exit_code, f.signal, f.error, f.reason,
           NULL, 0, f.retried_at
    FROM bsup.finished f
) s ON s.job_id = j.id
LEFT JOIN bsup.session h ON h.id = s.session AND s.state = 'running'
WHERE s.retried_at IS NULL;

-- Stops jobs: what does not run is canceled, the host of what runs is told. Returns for each 'canceled', 'stopping', or the
-- final state it already had (then is_over). Asked again, a stop only gets harder: a shorter grace, a kill. All at once, in
-- the order in which completions lock too: leases, then those that wait. The settings hold the plans: jobs are found by id.
CREATE OR REPLACE FUNCTION bsup.stop_jobs(p_jobs bigint[], p_grace double precision, p_kill boolean, p_by text)
RETURNS TABLE (job_id bigint, did text, is_over boolean)
LANGUAGE plpgsql
SET enable_seqscan = off SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    v_now constant timestamptz := bsup.clock();
    v_left bigint[] := ARRAY(SELECT DISTINCT j FROM unnest(p_jobs) j ORDER BY j);
    v_running bigint[] := '{}';
    v_canceled bigint[] := '{}';
    v_over bigint[] := '{}';
    v_states text[] := '{}';
    v_found bigint[];
    v_ended text[];
    v_unknown bigint;
BEGIN
    IF p_grace < 0 OR p_grace > 315360000 THEN
        PERFORM bsup.refuse('grace', 'is out of range', '0 to ten years, in seconds');
    END IF;
    -- Jobs move between tables while we look; look until each is found.
    FOR i IN 1..100 LOOP
        v_found := ARRAY(SELECT l.job_id FROM bsup.lease l WHERE l.job_id = ANY (v_left)
                         ORDER BY l.job_id FOR NO KEY UPDATE);
        UPDATE bsup.lease l
        SET stop_at = coalesce(l.stop_at, v_now), stop_by = coalesce(l.stop_by, p_by), stop_kill = l.stop_kill OR p_kill,
            stop_grace = CASE WHEN l.stop_at IS NULL THEN p_grace ELSE least(l.stop_grace, p_grace) END
        WHERE l.job_id = ANY (v_found);
        v_running := v_running || v_found;

        v_found := ARRAY(SELECT w.job_id FROM bsup.waiting w WHERE w.job_id = ANY (v_left) ORDER BY w.job_id FOR UPDATE);
        WITH gone AS (
            DELETE FROM bsup.waiting w WHERE w.job_id = ANY (v_found) RETURNING w.*
        )
        INSERT INTO bsup.finished (job_id, generation, need_id, state, revision, attempt, failures, losses, releases, reason,
                                   ended_at)
        SELECT g.job_id, g.generation, g.need_id, 'canceled', g.revision + 1, g.attempt, g.failures, g.losses, g.releases,
               'stop', v_now
        FROM gone g;
        v_canceled := v_canceled || v_found;

        v_found := ARRAY(SELECT r.job_id FROM bsup.ready r WHERE r.job_id = ANY (v_left) ORDER BY r.job_id FOR UPDATE);
        WITH gone AS (
            DELETE FROM bsup.ready r WHERE r.job_id = ANY (v_found) RETURNING r.*
        )
        INSERT INTO bsup.finished (job_id, generation, need_id, state, revision, attempt, failures, losses, releases, reason,
                                   ended_at)
        SELECT g.job_id, g.generation, g.need_id, 'canceled', g.revision + 1, g.attempt, g.failures, g.losses, g.releases,
               'stop', v_now
        FROM gone g;
        v_canceled := v_canceled || v_found;

        v_left := ARRAY(SELECT j FROM unnest(v_left) j EXCEPT SELECT f FROM unnest(v_running || v_canceled) f);
        SELECT coalesce(array_agg(f.job_id), '{}'), coalesce(array_agg(f.state), '{}') INTO v_found, v_ended
        FROM bsup.finished f WHERE f.job_id = ANY (v_left) AND f.retried_at IS NULL;
        v_over := v_over || v_found;
        v_states := v_states || v_ended;
        v_left := ARRAY(SELECT j FROM unnest(v_left) j EXCEPT SELECT f FROM unnest(v_found) f);
        EXIT WHEN cardinality(v_left) = 0;
        SELECT min(u) INTO v_unknown FROM unnest(v_left) u WHERE NOT EXISTS (SELECT FROM bsup.job j WHERE j.id = u);
        IF v_unknown IS NOT NULL THEN
            PERFORM bsup.refuse_job(v_unknown, 'unknown', '');
        END IF;
    END LOOP;
    IF cardinality(v_left) > 0 THEN
        RAISE EXCEPTION 'jobs to stop move too fast: try again' USING ERRCODE = '40001';
    END IF;

    INSERT INTO bsup.event (at, job_id, type, detail)
    SELECT v_now, s.job_id, 'stop', jsonb_build_object('by', p_by, 'grace', p_grace, 'kill', p_kill, 'did', s.did)
    FROM (
        SELECT c AS job_id, 'canceled' AS did FROM unnest(v_canceled) c
        UNION ALL
        SELECT r, 'stopping' FROM unnest(v_running) r
    ) s ORDER BY s.job_id;
    IF cardinality(v_running) > 0 THEN
        PERFORM bsup.wake('stop');
    END IF;
    IF cardinality(v_canceled) > 0 THEN
        DELETE FROM bsup.job_secret s WHERE s.job_id = ANY (v_canceled);
        PERFORM bsup.settle('{}', v_canceled);
    END IF;
    RETURN QUERY
    SELECT s.job_id, s.did, s.is_over
    FROM (
        SELECT c AS job_id, 'canceled' AS did, false AS is_over FROM unnest(v_canceled) c
        UNION ALL
        SELECT r, 'stopping', false FROM unnest(v_running) r
        UNION ALL
        SELECT o.job_id, o.state, true FROM unnest(v_over, v_states) AS o (job_id, state)
    ) s ORDER BY s.job_id;
END $$;
