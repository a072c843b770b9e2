-- oldest: 5
-- What moves jobs on after a claim: completions, what they mean for children, the pulse and the reaper. The rules are those
-- of supervisor/model/lifecycle.py. Locks are taken in the order session, lease, waiting, each by job id.

-- What jobs that ended mean for those that wait for them: children of the succeeded are counted down and readied,
-- all that lies behind the others is canceled, reason 'upstream'. The caller holds the jobs' own rows locked, so nobody
-- can add a child meanwhile. Returns whether a job became ready.
CREATE FUNCTION bsup.settle(p_succeeded bigint[], p_others bigint[]) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    v_now constant timestamptz := bsup.clock();
    v_children bigint[];
    v_doomed bigint[];
    v_readied integer;
BEGIN
    v_children := ARRAY(SELECT DISTINCT e.child FROM bsup.edge e WHERE e.parent = ANY (p_succeeded) AND NOT e.done);
    WITH RECURSIVE below (id) AS (
        SELECT e.child FROM bsup.edge e WHERE e.parent = ANY (p_others) AND NOT e.done
        UNION
        SELECT e.child FROM below b JOIN bsup.edge e ON e.parent = b.id AND NOT e.done
    )
    SELECT array_agg(b.id) INTO v_doomed FROM below b;
    IF cardinality(v_children) = 0 AND v_doomed IS NULL THEN
        RETURN false;
    END IF;
    PERFORM FROM bsup.waiting w WHERE w.job_id = ANY (v_children || v_doomed) ORDER BY w.job_id FOR UPDATE;
    WITH gone AS (
        DELETE FROM bsup.waiting w WHERE w.job_id = ANY (v_doomed) RETURNING w.*
    )
    INSERT INTO bsup.finished (job_id, generation, need_id, state, revision, attempt, failures, losses, releases, reason,
                               ended_at)
    SELECT g.job_id, g.generation, g.need_id, 'canceled', g.revision + 1, g.attempt, g.failures, g.losses, g.releases,
           'upstream', v_now
    FROM gone g;
    DELETE FROM bsup.job_secret s WHERE s.job_id = ANY (v_doomed);
    WITH counted AS (
        UPDATE bsup.edge e SET done = true WHERE e.parent = ANY (p_succeeded) AND NOT e.done RETURNING e.child
    )
    UPDATE bsup.waiting w SET parents_left = w.parents_left - c.n
    FROM (SELECT k.child, count(*)::integer AS n FROM counted k GROUP BY k.child) c
    WHERE w.job_id = c.child;
    WITH gone AS (
        DELETE FROM bsup.waiting w
        WHERE w.job_id = ANY (v_children) AND w.parents_left = 0 AND (w.run_at IS NULL OR w.run_at <= v_now)
        RETURNING w.*
    )
    INSERT INTO bsup.ready (job_id, need_id, priority, loss_budget, cpu, memory, alone, generation, revision, attempt,
                            failures, losses, releases, ready_at)
    SELECT g.job_id, g.need_id, g.priority, g.loss_budget, g.cpu, g.memory, g.losses >= 2, g.generation, g.revision + 1,
           g.attempt, g.failures, g.losses, g.releases, v_now
    FROM gone g;
    GET DIAGNOSTICS v_readied = ROW_COUNT;
    RETURN v_readied > 0;
END $$;

-- Readies waiting jobs whose time has come.
CREATE FUNCTION bsup.promote(p_limit integer) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    v_now constant timestamptz := bsup.clock();
    v_count integer;
BEGIN
    WITH due AS MATERIALIZED (
        SELECT w.job_id FROM bsup.waiting w
        WHERE w.run_at IS NOT NULL AND w.run_at <= v_now AND w.parents_left = 0
        ORDER BY w.run_at LIMIT p_limit FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM bsup.waiting w WHERE w.job_id = ANY (ARRAY(SELECT d.job_id FROM due d)) RETURNING w.*
    )
    INSERT INTO bsup.ready (job_id, need_id, priority, loss_budget, cpu, memory, alone, generation, revision, attempt,
                            failures, losses, releases, ready_at)
    SELECT g.job_id, g.need_id, g.priority, g.loss_budget, g.cpu, g.memory, g.losses >= 2, g.generation, g.revision + 1,
           g.attempt, g.failures, g.losses, g.releases, v_now
    FROM gone g;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    IF v_count > 0 THEN
        PERFORM bsup.wake('ready');
    END IF;
    RETURN v_count;
END $$;

CREATE FUNCTION bsup.state_of(p_job bigint) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT coalesce(
        (SELECT 'running' FROM bsup.lease l WHERE l.job_id = p_job),
        (SELECT 'ready' FROM bsup.ready r WHERE r.job_id = p_job),
        (SELECT 'waiting' FROM bsup.waiting w WHERE w.job_id = p_job),
        (SELECT f.state FROM bsup.finished f WHERE f.job_id = p_job AND f.retried_at IS NULL),
        'unknown')
$$;

-- Ends attempts of a session, each fenced by its lease. For each: recorded with the job's state that followed (also if it
-- was recorded before), or refused, with the job's state now. Without p_wait a lease that someone has locked (a submission
-- that names its job as a parent, until that commits) is passed over: recorded is null, and the caller asks again.
-- A repeat within one call is refused by the caller.
CREATE FUNCTION bsup.end_attempts(
    p_session uuid, p_host text, p_counters bigint[], p_jobs bigint[], p_attempts integer[], p_outcomes text[],
    p_exit_codes smallint[], p_signals smallint[], p_errors text[], p_reasons text[], p_delays double precision[],
    p_started timestamptz[], p_ended timestamptz[], p_steps jsonb, p_wait boolean
) RETURNS TABLE (counter bigint, recorded boolean, state text)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_now constant timestamptz := bsup.clock();
    v_held bigint[];
    v_became text[];
    v_succeeded bigint[];
    v_others bigint[];
    v_readied boolean;
BEGIN
    -- Not one statement with the move: under READ COMMITTED a DELETE that waits for a lock sees the row's new version,
    -- but its CTEs don't.
    IF p_wait THEN
        v_held := ARRAY(
            SELECT l.counter FROM unnest(p_counters, p_jobs, p_attempts) AS i (counter, job_id, attempt)
            JOIN bsup.lease l ON l.session = p_session AND l.counter = i.counter
            WHERE l.job_id = i.job_id AND l.attempt = i.attempt
            ORDER BY l.job_id FOR UPDATE OF l);
    ELSE
        v_held := ARRAY(
            SELECT l.counter FROM unnest(p_counters, p_jobs, p_attempts) AS i (counter, job_id, attempt)
            JOIN bsup.lease l ON l.session = p_session AND l.counter = i.counter
            WHERE l.job_id = i.job_id AND l.attempt = i.attempt
            ORDER BY l.job_id FOR UPDATE OF l SKIP LOCKED);
    END IF;
    WITH gone AS (
        DELETE FROM bsup.lease l WHERE l.session = p_session AND l.counter = ANY (v_held) RETURNING l.*
    ), ended AS MATERIALIZED (
        SELECT g.*, i.outcome, i.exit_code, i.signal, i.error, i.delay, coalesce(i.started, g.leased_at) AS started_at,
               coalesce(i.ended, v_now) AS ended_at, i.reason,
               CASE
                   WHEN i.outcome = 'succeeded' THEN 'succeeded'
                   WHEN i.outcome = 'canceled' THEN 'canceled'
                   WHEN i.outcome = 'failed' AND i.delay IS NULL THEN 'failed'
                   WHEN g.stop_at IS NOT NULL THEN 'canceled'
                   WHEN i.outcome = 'failed' AND i.delay > 0 THEN 'waiting'
                   WHEN i.outcome = 'lost' AND g.losses + 1 >= g.loss_budget THEN 'failed'
                   ELSE 'ready'
               END AS became
        FROM gone g
        JOIN unnest(p_counters, p_outcomes, p_exit_codes, p_signals, p_errors, p_reasons, p_delays, p_started, p_ended)
            AS i (counter, outcome, exit_code, signal, error, reason, delay, started, ended) ON i.counter = g.counter
    ), counted AS MATERIALIZED (
        -- A stop that turned a way back into the end counts nothing.
        SELECT e.*, e.outcome = 'failed' AND e.became <> 'canceled' AS failure,
               e.outcome = 'lost' AND e.became <> 'canceled' AS loss,
               e.outcome = 'released' AND e.became <> 'canceled' AS release
        FROM ended e
    ), final AS (
        INSERT INTO bsup.finished (job_id, generation, need_id, state, revision, attempt, failures, losses, releases,
                                   exit_code, signal, error, reason, started_at, ended_at, host, session, counter)
        SELECT c.job_id, c.generation, c.need_id, c.became, c.revision + 1, c.attempt, c.failures + c.failure::integer,
               c.losses + c.loss::integer, c.releases + c.release::integer, c.exit_code, c.signal, c.error,
               CASE WHEN c.loss THEN 'losses'
                    WHEN c.became = 'canceled' AND c.outcome <> 'canceled' THEN 'stop'
                    WHEN c.became = 'canceled' THEN coalesce(c.reason, 'stop')
                    ELSE c.reason END,
               c.started_at, least(c.ended_at, v_now), p_host, p_session, c.counter
        FROM counted c WHERE c.became IN ('succeeded', 'failed', 'canceled')
    ), again AS (
        INSERT INTO bsup.ready (job_id, need_id, priority, loss_budget, cpu, memory, alone, generation, revision, attempt,
                                failures, losses, releases, ready_at)
        SELECT c.job_id, c.need_id, c.priority, c.loss_budget, c.cpu, c.memory, c.losses + c.loss::integer >= 2,
               c.generation, c.revision + CASE WHEN c.outcome = 'failed' THEN 2 ELSE 1 END, c.attempt,
               c.failures + c.failure::integer, c.losses + c.loss::integer, c.releases + c.release::integer, v_now
        FROM counted c WHERE c.became = 'ready'
    ), later AS (
        INSERT INTO bsup.waiting (job_id, need_id, priority, loss_budget, cpu, memory, generation, revision, attempt,
                                  failures, losses, releases, run_at)
        SELECT c.job_id, c.need_id, c.priority, c.loss_budget, c.cpu, c.memory, c.generation, c.revision + 1, c.attempt,
               c.failures + 1, c.losses, c.releases, v_now + make_interval(secs => least(c.delay, 315360000))
        FROM counted c WHERE c.became = 'waiting'
    ), history AS (
        INSERT INTO bsup.attempt (job_id, attempt, generation, session, counter, host, outcome, became, exit_code, signal,
                                  error, reason, leased_at, started_at, ended_at)
        SELECT c.job_id, c.attempt, c.generation, p_session, c.counter, p_host, c.outcome, c.became, c.exit_code, c.signal,
               c.error, c.reason, c.leased_at, c.started_at, c.ended_at
        FROM counted c
    ), steps AS (
        INSERT INTO bsup.step (job_id, attempt, idx, name, state, exit_code, signal, started_at, ended_at, error)
        SELECT c.job_id, c.attempt, s.index, s.name, s.state, s.exit_code, s.signal, s.started_at, s.ended_at, s.error
        FROM jsonb_to_recordset(p_steps) AS s (counter bigint, index smallint, name text, state text, exit_code smallint,
            signal smallint, started_at timestamptz, ended_at timestamptz, error text)
        JOIN counted c ON c.counter = s.counter
        ON CONFLICT (job_id, attempt, idx) DO UPDATE SET
            name = excluded.name, state = excluded.state, exit_code = excluded.exit_code, signal = excluded.signal,
            started_at = excluded.started_at, ended_at = excluded.ended_at, error = excluded.error
    ), told AS (
        INSERT INTO bsup.event (at, job_id, type, detail)
        SELECT v_now, c.job_id, CASE c.outcome WHEN 'lost' THEN 'loss' ELSE 'release' END,
               jsonb_build_object('attempt', c.attempt, 'host', p_host, 'reason', c.reason, 'became', c.became)
        FROM counted c WHERE c.outcome IN ('lost', 'released')
    )
    SELECT array_agg(c.counter), array_agg(c.became), array_agg(c.job_id) FILTER (WHERE c.became = 'succeeded'),
           array_agg(c.job_id) FILTER (WHERE c.became IN ('failed', 'canceled')),
           coalesce(bool_or(c.became = 'ready'), false)
    INTO v_held, v_became, v_succeeded, v_others, v_readied FROM counted c;
    DELETE FROM bsup.job_secret s WHERE s.job_id = ANY (v_succeeded || v_others);
    IF EXISTS (SELECT FROM bsup.edge e WHERE e.parent = ANY (v_succeeded || v_others)) THEN
        v_readied := bsup.settle(v_succeeded, v_others) OR v_readied;
    END IF;
    IF v_readied THEN
        PERFORM bsup.wake('ready');
    END IF;
    RETURN QUERY SELECT h.counter, true, h.became FROM unnest(v_held, v_became) AS h (counter, became);
    IF coalesce(cardinality(v_held), 0) < cardinality(p_counters) THEN
        RETURN QUERY
        SELECT i.counter,
               CASE WHEN a.became IS NOT NULL THEN true WHEN l.counter IS NOT NULL THEN NULL ELSE false END,
               coalesce(a.became, bsup.state_of(i.job_id))
        FROM unnest(p_counters, p_jobs, p_attempts) AS i (counter, job_id, attempt)
        LEFT JOIN bsup.attempt a ON a.job_id = i.job_id AND a.attempt = i.attempt
            AND a.session = p_session AND a.counter = i.counter
        LEFT JOIN bsup.lease l ON l.session = p_session AND l.counter = i.counter
            AND l.job_id = i.job_id AND l.attempt = i.attempt
        WHERE i.counter <> ALL (coalesce(v_held, '{}'));
    END IF;
END $$;

-- A holder's completions: end_attempts, for the incarnation that holds the session. BS003: it doesn't.
CREATE FUNCTION bsup.finish(
    p_session uuid, p_incarnation uuid, p_counters bigint[], p_jobs bigint[], p_attempts integer[], p_outcomes text[],
    p_exit_codes smallint[], p_signals smallint[], p_errors text[], p_reasons text[], p_delays double precision[],
    p_started timestamptz[], p_ended timestamptz[], p_steps jsonb, p_wait boolean
) RETURNS TABLE (counter bigint, recorded boolean, state text)
LANGUAGE plpgsql AS $$
DECLARE
    v_host text;
BEGIN
    SELECT s.host INTO v_host FROM bsup.session s WHERE s.id = p_session AND s.incarnation = p_incarnation;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the session is gone or held by another daemon' USING ERRCODE = 'BS003';
    END IF;
    RETURN QUERY SELECT * FROM bsup.end_attempts(
        p_session, v_host, p_counters, p_jobs, p_attempts, p_outcomes, p_exit_codes, p_signals, p_errors, p_reasons,
        p_delays, p_started, p_ended, p_steps, p_wait);
END $$;

-- Ends at most p_limit of a session's leases without their holder; those that someone has locked are left.
CREATE FUNCTION bsup.take_leases(p_session uuid, p_host text, p_outcome text, p_reason text, p_limit integer)
RETURNS TABLE (counter bigint, recorded boolean, state text)
LANGUAGE plpgsql AS $$
DECLARE
    v_counters bigint[];
    v_jobs bigint[];
    v_attempts integer[];
    v_count integer;
BEGIN
    SELECT array_agg(x.counter), array_agg(x.job_id), array_agg(x.attempt), count(*)
    INTO v_counters, v_jobs, v_attempts, v_count
    FROM (SELECT l.counter, l.job_id, l.attempt FROM bsup.lease l WHERE l.session = p_session
          ORDER BY l.job_id LIMIT p_limit FOR UPDATE SKIP LOCKED) x;
    IF v_count = 0 THEN
        RETURN;
    END IF;
    RETURN QUERY SELECT * FROM bsup.end_attempts(
        p_session, p_host, v_counters, v_jobs, v_attempts, array_fill(p_outcome, ARRAY[v_count]), NULL, NULL, NULL,
        array_fill(p_reason, ARRAY[v_count]), NULL, NULL, NULL, '[]', false);
END $$;

-- Ends a session; leases left are released, uncounted. Returns how many leases remain, locked by others: then the session
-- stays, and the caller asks again.
CREATE FUNCTION bsup.close_session(p_session uuid, p_incarnation uuid) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_host text;
    v_left bigint;
BEGIN
    SELECT s.host INTO v_host FROM bsup.session s
    WHERE s.id = p_session AND s.incarnation = p_incarnation FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the session is gone or held by another daemon' USING ERRCODE = 'BS003';
    END IF;
    PERFORM bsup.take_leases(p_session, v_host, 'released', 'session closed', NULL);
    SELECT count(*) INTO v_left FROM bsup.lease l WHERE l.session = p_session;
    IF v_left = 0 THEN
        DELETE FROM bsup.session s WHERE s.id = p_session;
    END IF;
    RETURN v_left;
END $$;

-- The sign of life. Whoever comes first in a second writes it. A gap over 5 s (the database or all daemons were away), a
-- clock that went back, or a new timeline (a failover) puts reaping off by a term: hosts that could not renew get to.
CREATE FUNCTION bsup.beat(p_term double precision) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_pulse bsup.pulse;
    v_now timestamptz;
    v_timeline text;
    v_why text;
    v_term double precision;
BEGIN
    SELECT * INTO v_pulse FROM bsup.pulse p FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    -- Read under the lock: read before it, the clock would seem to have gone back.
    v_now := bsup.clock();
    v_timeline := left(pg_walfile_name(pg_current_wal_insert_lsn()), 8);
    v_why := CASE
        WHEN v_pulse.at IS NULL THEN 'first'
        WHEN v_now < v_pulse.at THEN 'clock went back'
        WHEN v_now > v_pulse.at + interval '5 s' THEN 'gap'
        WHEN v_timeline <> v_pulse.timeline THEN 'new timeline'
    END;
    IF v_why IS NULL THEN
        IF v_now >= v_pulse.at + interval '0.9 s' THEN
            UPDATE bsup.pulse p SET at = v_now;
        END IF;
        RETURN;
    END IF;
    SELECT greatest(p_term, max(s.term)) INTO v_term FROM bsup.session s;
    UPDATE bsup.pulse p
    SET at = v_now, timeline = v_timeline, reap_not_before = v_now + make_interval(secs => v_term);
    IF v_why <> 'first' THEN
        INSERT INTO bsup.event (at, type, detail) VALUES (v_now, 'reaping_put_off', jsonb_build_object(
            'reason', v_why, 'last_pulse', v_pulse.at, 'term', v_term));
    END IF;
END $$;

-- One pass of the reaper: takes dead sessions' leases, at most p_limit, and readies what is due. An old pulse counts as
-- none: what it would have noticed, nobody has yet.
CREATE FUNCTION bsup.reap(p_limit integer)
RETURNS TABLE (requeued integer, failed integer, sessions uuid[], promoted integer, reap_not_before timestamptz)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_now constant timestamptz := bsup.clock();
    v_pulse bsup.pulse;
    v_session record;
    v_taken record;
    v_left integer := p_limit;
BEGIN
    requeued := 0;
    failed := 0;
    sessions := '{}';
    SELECT * INTO STRICT v_pulse FROM bsup.pulse p;
    IF v_pulse.reap_not_before > v_now THEN
        reap_not_before := v_pulse.reap_not_before;
    ELSIF v_pulse.at BETWEEN v_now - interval '5 s' AND v_now
        AND v_pulse.timeline = left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) THEN
        FOR v_session IN
            SELECT s.id, s.host, s.dead_at, s.expires_at FROM bsup.session s
            WHERE s.expires_at < v_now ORDER BY s.expires_at FOR UPDATE SKIP LOCKED
        LOOP
            IF v_session.dead_at IS NULL THEN
                -- Another incarnation: from here on every write of the holder is refused, also if its leases take more
                -- than this pass.
                UPDATE bsup.session s SET dead_at = v_now, idle = false, incarnation = gen_random_uuid()
                WHERE s.id = v_session.id;
                INSERT INTO bsup.event (at, type, detail) VALUES (v_now, 'session_expired', jsonb_build_object(
                    'host', v_session.host, 'session', replace(v_session.id::text, '-', ''),
                    'expired_at', v_session.expires_at));
            END IF;
            SELECT count(*)::integer AS n, count(*) FILTER (WHERE t.state = 'ready')::integer AS again,
                   count(*) FILTER (WHERE t.state = 'failed')::integer AS failed
            INTO v_taken
            FROM bsup.take_leases(v_session.id, v_session.host, 'lost', 'host lost', v_left) t;
            requeued := requeued + v_taken.again;
            failed := failed + v_taken.failed;
            v_left := v_left - v_taken.n;
            IF NOT EXISTS (SELECT FROM bsup.lease l WHERE l.session = v_session.id) THEN
                DELETE FROM bsup.session s WHERE s.id = v_session.id;
                sessions := sessions || v_session.id;
            END IF;
            EXIT WHEN v_left <= 0;
        END LOOP;
    END IF;
    promoted := bsup.promote(p_limit);
    RETURN NEXT;
END $$;
