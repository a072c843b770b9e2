-- oldest: 8
-- Completions with as little written as can be. An attempt that succeeded, as most do, is told by its job's finished row;
-- the others have rows of their own, as before. Leases are found by their keys and deleted by their place.

ALTER TABLE bsup.finished ADD COLUMN leased_at timestamptz;
ALTER TABLE bsup.attempt RENAME TO attempt_row;

-- In one direction, so that a claim can begin after the key where the one before ended: (-priority, job_id) > (…).
DROP INDEX bsup.ready_claim;
CREATE INDEX ready_order ON bsup.ready (need_id, (-priority), job_id);

-- Attempts that ended: those with a row of their own, and those whose finished row has leased_at, which succeeded. The
-- condition stands outside, as each branch must be a single table without a WHERE of its own: see bsup.jobs.
CREATE VIEW bsup.attempt AS
SELECT a.job_id, a.attempt, a.generation, a.session, a.counter, a.leased_at, a.started_at, a.ended_at, a.exit_code, a.signal,
       a.outcome, a.became, a.host, a.reason, a.error
FROM (
    SELECT r.job_id, r.attempt, r.generation, r.session, r.counter, r.leased_at, r.started_at, r.ended_at, r.exit_code,
           r.signal, r.outcome, r.became, r.host, r.reason, r.error
    FROM bsup.attempt_row r
    UNION ALL
    SELECT f.job_id, f.attempt, f.generation, f.session, f.counter, f.leased_at, f.started_at, f.ended_at, f.exit_code,
           f.signal, f.state, f.state, f.host, f.reason, f.error
    FROM bsup.finished f
) a
WHERE a.leased_at IS NOT NULL;

-- Daemons of the version before write `superseded` through the view.
CREATE FUNCTION bsup.supersede_attempt() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE bsup.attempt_row r
    SET outcome = new.outcome, exit_code = new.exit_code, signal = new.signal, error = new.error, reason = new.reason,
        started_at = new.started_at, ended_at = new.ended_at
    WHERE r.job_id = old.job_id AND r.attempt = old.attempt;
    RETURN new;
END $$;
CREATE TRIGGER supersede INSTEAD OF UPDATE ON bsup.attempt
FOR EACH ROW EXECUTE FUNCTION bsup.supersede_attempt();

-- Ends attempts of a session, each fenced by its lease; returns those that were recorded, with the job's state that
-- followed. p_outcomes null: all succeeded. Without p_wait a lease that someone has locked (a submission that names its
-- job as a parent, until that commits) is passed over.
-- The settings hold the plans: whatever the size of the table was when they were made, a lease is found by its keys.
CREATE FUNCTION bsup.end_leases(
    p_session uuid, p_host text, p_counters bigint[], p_jobs bigint[], p_attempts integer[], p_outcomes text[],
    p_exit_codes smallint[], p_signals smallint[], p_errors text[], p_reasons text[], p_delays double precision[],
    p_started timestamptz[], p_ended timestamptz[], p_steps jsonb, p_wait boolean, OUT held bigint[], OUT became text[]
) LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_now constant timestamptz := bsup.clock();
    v_at tid[];
    v_other_at tid[];
    v_jobs bigint[];
    v_succeeded bigint[];
    v_others bigint[];
    v_other_counters bigint[];
    v_other_became text[];
    v_readied boolean := false;
BEGIN
    -- Not one statement with the move: under READ COMMITTED a DELETE that waits for a lock sees the row's new version,
    -- but its CTEs don't.
    IF p_wait THEN
        SELECT array_agg(x.at) FILTER (WHERE x.succeeded), array_agg(x.counter) FILTER (WHERE x.succeeded),
               array_agg(x.job_id) FILTER (WHERE x.succeeded), array_agg(x.at) FILTER (WHERE NOT x.succeeded)
        INTO v_at, held, v_succeeded, v_other_at
        FROM (
            SELECT l.at, l.counter, l.job_id, coalesce(i.outcome = 'succeeded', true) AS succeeded
            FROM (SELECT * FROM unnest(p_counters, p_jobs, p_attempts, p_outcomes) AS u (counter, job_id, attempt, outcome)
                  ORDER BY u.job_id) i
            CROSS JOIN LATERAL (
                SELECT l.ctid AS at, l.counter, l.job_id FROM bsup.lease l
                WHERE l.job_id = i.job_id AND l.session = p_session AND l.counter = i.counter AND l.attempt = i.attempt
                FOR UPDATE
            ) l
        ) x;
    ELSE
        SELECT array_agg(x.at) FILTER (WHERE x.succeeded), array_agg(x.counter) FILTER (WHERE x.succeeded),
               array_agg(x.job_id) FILTER (WHERE x.succeeded), array_agg(x.at) FILTER (WHERE NOT x.succeeded)
        INTO v_at, held, v_succeeded, v_other_at
        FROM (
            SELECT l.at, l.counter, l.job_id, coalesce(i.outcome = 'succeeded', true) AS succeeded
            FROM (SELECT * FROM unnest(p_counters, p_jobs, p_attempts, p_outcomes) AS u (counter, job_id, attempt, outcome)
                  ORDER BY u.job_id) i
            CROSS JOIN LATERAL (
                SELECT l.ctid AS at, l.counter, l.job_id FROM bsup.lease l
                WHERE l.job_id = i.job_id AND l.session = p_session AND l.counter = i.counter AND l.attempt = i.attempt
                FOR UPDATE SKIP LOCKED
            ) l
        ) x;
    END IF;
    IF v_at IS NOT NULL THEN
        WITH gone AS (
            DELETE FROM bsup.lease l WHERE l.ctid = ANY (v_at)
            RETURNING l.counter, l.job_id, l.generation, l.need_id, l.revision, l.attempt, l.failures, l.losses, l.releases,
                      l.leased_at
        )
        INSERT INTO bsup.finished (job_id, generation, need_id, state, revision, attempt, failures, losses, releases,
                                   exit_code, signal, error, reason, leased_at, started_at, ended_at, recorded_at, host,
                                   session, counter)
        SELECT g.job_id, g.generation, g.need_id, 'succeeded', g.revision + 1, g.attempt, g.failures, g.losses, g.releases,
               i.exit_code, i.signal, i.error, i.reason, g.leased_at, coalesce(i.started, g.leased_at),
               least(coalesce(i.ended, v_now), v_now), v_now, p_host, p_session, g.counter
        FROM gone g
        JOIN unnest(p_counters, p_exit_codes, p_signals, p_errors, p_reasons, p_started, p_ended)
            AS i (counter, exit_code, signal, error, reason, started, ended) ON i.counter = g.counter;
        became := array_fill('succeeded'::text, ARRAY[cardinality(held)]);
    END IF;
    IF v_other_at IS NOT NULL THEN
        SELECT o.counters, o.became, o.others, o.readied INTO v_other_counters, v_other_became, v_others, v_readied
        FROM bsup.end_otherwise(p_session, p_host, v_other_at, p_counters, p_outcomes, p_exit_codes, p_signals, p_errors,
                                p_reasons, p_delays, p_started, p_ended) o;
        held := held || v_other_counters;
        became := became || v_other_became;
    END IF;
    IF held IS NULL THEN
        RETURN;
    END IF;
    IF p_steps <> '[]' THEN
        INSERT INTO bsup.step (job_id, attempt, idx, name, state, exit_code, signal, started_at, ended_at, error)
        SELECT i.job_id, i.attempt, s.index, s.name, s.state, s.exit_code, s.signal, s.started_at, s.ended_at, s.error
        FROM jsonb_to_recordset(p_steps) AS s (counter bigint, index smallint, name text, state text, exit_code smallint,
            signal smallint, started_at timestamptz, ended_at timestamptz, error text)
        JOIN unnest(p_counters, p_jobs, p_attempts) AS i (counter, job_id, attempt) ON i.counter = s.counter
        JOIN unnest(held) AS h (counter) ON h.counter = i.counter
        ON CONFLICT (job_id, attempt, idx) DO UPDATE SET
            name = excluded.name, state = excluded.state, exit_code = excluded.exit_code, signal = excluded.signal,
            started_at = excluded.started_at, ended_at = excluded.ended_at, error = excluded.error;
    END IF;
    v_jobs := v_succeeded || v_others;
    DELETE FROM bsup.job_secret s WHERE s.job_id = ANY (v_jobs);
    IF EXISTS (SELECT FROM bsup.edge e WHERE e.parent = ANY (v_jobs)) THEN
        v_readied := bsup.settle(v_succeeded, v_others) OR v_readied;
    END IF;
    IF v_readied THEN
        PERFORM bsup.wake('ready');
    END IF;
END $$;

-- Ends the attempts whose leases, locked by the caller, are at p_at and that did not succeed. others: jobs that are final
-- now, but for the succeeded.
CREATE FUNCTION bsup.end_otherwise(
    p_session uuid, p_host text, p_at tid[], p_counters bigint[], p_outcomes text[], p_exit_codes smallint[],
    p_signals smallint[], p_errors text[], p_reasons text[], p_delays double precision[], p_started timestamptz[],
    p_ended timestamptz[], OUT counters bigint[], OUT became text[], OUT others bigint[], OUT readied boolean
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_now constant timestamptz := bsup.clock();
BEGIN
    WITH gone AS (
        DELETE FROM bsup.lease l WHERE l.ctid = ANY (p_at) RETURNING l.*
    ), ended AS MATERIALIZED (
        SELECT g.*, i.outcome, i.exit_code, i.signal, i.error, i.delay, coalesce(i.started, g.leased_at) AS started_at,
               coalesce(i.ended, v_now) AS ended_at, i.reason,
               CASE
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
                                   exit_code, signal, error, reason, started_at, ended_at, recorded_at, host, session,
                                   counter)
        SELECT c.job_id, c.generation, c.need_id, c.became, c.revision + 1, c.attempt, c.failures + c.failure::integer,
               c.losses + c.loss::integer, c.releases + c.release::integer, c.exit_code, c.signal, c.error,
               CASE WHEN c.loss THEN 'losses'
                    WHEN c.became = 'canceled' AND c.outcome <> 'canceled' THEN 'stop'
                    WHEN c.became = 'canceled' THEN coalesce(c.reason, 'stop')
                    ELSE c.reason END,
               c.started_at, least(c.ended_at, v_now), v_now, p_host, p_session, c.counter
        FROM counted c WHERE c.became IN ('failed', 'canceled')
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
        INSERT INTO bsup.attempt_row (job_id, attempt, generation, session, counter, host, outcome, became, exit_code,
                                      signal, error, reason, leased_at, started_at, ended_at)
        SELECT c.job_id, c.attempt, c.generation, p_session, c.counter, p_host, c.outcome, c.became, c.exit_code, c.signal,
               c.error, c.reason, c.leased_at, c.started_at, c.ended_at
        FROM counted c
    ), told AS (
        INSERT INTO bsup.event (at, job_id, type, detail)
        SELECT v_now, c.job_id, CASE c.outcome WHEN 'lost' THEN 'loss' ELSE 'release' END,
               jsonb_build_object('attempt', c.attempt, 'host', p_host, 'reason', c.reason, 'became', c.became)
        FROM counted c WHERE c.outcome IN ('lost', 'released')
    )
    SELECT array_agg(c.counter), array_agg(c.became),
           array_agg(c.job_id) FILTER (WHERE c.became IN ('failed', 'canceled')),
           coalesce(bool_or(c.became = 'ready'), false)
    INTO counters, became, others, readied FROM counted c;
END $$;

-- What became of attempts of a session that are not among its leases, or are locked by someone (recorded is null): recorded
-- before, with the job's state that followed, or refused, with the job's state now.
CREATE FUNCTION bsup.read_back(p_session uuid, p_counters bigint[], p_jobs bigint[], p_attempts integer[], p_but bigint[])
RETURNS TABLE (counter bigint, recorded boolean, state text)
LANGUAGE sql STABLE AS $$
    SELECT i.counter,
           CASE WHEN a.became IS NOT NULL THEN true WHEN l.counter IS NOT NULL THEN NULL ELSE false END,
           coalesce(a.became, bsup.state_of(i.job_id))
    FROM unnest(p_counters, p_jobs, p_attempts) AS i (counter, job_id, attempt)
    LEFT JOIN LATERAL (
        SELECT a.became FROM bsup.attempt a
        WHERE a.job_id = i.job_id AND a.attempt = i.attempt AND a.session = p_session AND a.counter = i.counter OFFSET 0
    ) a ON true
    LEFT JOIN LATERAL (
        SELECT l.counter FROM bsup.lease l
        WHERE l.job_id = i.job_id AND l.session = p_session AND l.counter = i.counter AND l.attempt = i.attempt OFFSET 0
    ) l ON true
    WHERE i.counter <> ALL (coalesce(p_but, '{}'))
$$;

-- Ends attempts; see end_leases. For each: recorded with the job's state that followed (also if it was recorded before), or
-- refused, with the job's state now; recorded is null where the lease was passed over, and the caller asks again.
CREATE OR REPLACE FUNCTION bsup.end_attempts(
    p_session uuid, p_host text, p_counters bigint[], p_jobs bigint[], p_attempts integer[], p_outcomes text[],
    p_exit_codes smallint[], p_signals smallint[], p_errors text[], p_reasons text[], p_delays double precision[],
    p_started timestamptz[], p_ended timestamptz[], p_steps jsonb, p_wait boolean
) RETURNS TABLE (counter bigint, recorded boolean, state text)
LANGUAGE plpgsql AS $$
DECLARE
    v_held bigint[];
    v_became text[];
BEGIN
    SELECT e.held, e.became INTO v_held, v_became
    FROM bsup.end_leases(p_session, p_host, p_counters, p_jobs, p_attempts, p_outcomes, p_exit_codes, p_signals, p_errors,
                         p_reasons, p_delays, p_started, p_ended, p_steps, p_wait) e;
    RETURN QUERY SELECT h.counter, true, h.became FROM unnest(v_held, v_became) AS h (counter, became);
    IF coalesce(cardinality(v_held), 0) < cardinality(p_counters) THEN
        RETURN QUERY SELECT * FROM bsup.read_back(p_session, p_counters, p_jobs, p_attempts, v_held);
    END IF;
END $$;

-- A holder's completions, for the incarnation that holds the session (BS003: it doesn't). Returns as end_attempts, but only
-- what can't be guessed: an attempt that is not returned was recorded, and its job is in the state of its outcome's name.
-- p_started, p_ended: seconds since 1970. A repeat within one call is refused by the caller.
CREATE FUNCTION bsup.finish_batch(
    p_session uuid, p_incarnation uuid, p_counters bigint[], p_jobs bigint[], p_attempts integer[], p_outcomes text[],
    p_exit_codes smallint[], p_signals smallint[], p_errors text[], p_reasons text[], p_delays double precision[],
    p_started double precision[], p_ended double precision[], p_steps jsonb, p_wait boolean
) RETURNS TABLE (counter bigint, recorded boolean, state text)
LANGUAGE plpgsql AS $$
DECLARE
    v_host text;
    v_held bigint[];
    v_became text[];
BEGIN
    SELECT s.host INTO v_host FROM bsup.session s WHERE s.id = p_session AND s.incarnation = p_incarnation;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the session is gone or held by another daemon' USING ERRCODE = 'BS003';
    END IF;
    SELECT e.held, e.became INTO v_held, v_became
    FROM bsup.end_leases(p_session, v_host, p_counters, p_jobs, p_attempts, p_outcomes, p_exit_codes, p_signals, p_errors,
                         p_reasons, p_delays, ARRAY(SELECT to_timestamp(u) FROM unnest(p_started) u),
                         ARRAY(SELECT to_timestamp(u) FROM unnest(p_ended) u), p_steps, p_wait) e;
    IF p_outcomes IS NOT NULL THEN
        RETURN QUERY
        SELECT h.counter, true, h.became
        FROM unnest(v_held, v_became) AS h (counter, became)
        JOIN unnest(p_counters, p_outcomes) AS i (counter, outcome) ON i.counter = h.counter
        WHERE h.became <> i.outcome;
    END IF;
    IF coalesce(cardinality(v_held), 0) < cardinality(p_counters) THEN
        RETURN QUERY SELECT * FROM bsup.read_back(p_session, p_counters, p_jobs, p_attempts, v_held);
    END IF;
END $$;

CREATE OR REPLACE FUNCTION bsup.forget(p_jobs bigint[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM bsup.log_chunk t WHERE t.job_id = ANY (p_jobs);
    DELETE FROM bsup.log t WHERE t.job_id = ANY (p_jobs);
    DELETE FROM bsup.step t WHERE t.job_id = ANY (p_jobs);
    DELETE FROM bsup.attempt_row t WHERE t.job_id = ANY (p_jobs);
    DELETE FROM bsup.edge t WHERE t.parent = ANY (p_jobs);
    DELETE FROM bsup.edge t WHERE t.child = ANY (p_jobs);
    DELETE FROM bsup.submission_key t WHERE t.job_id = ANY (p_jobs);
    DELETE FROM bsup.job_secret t WHERE t.job_id = ANY (p_jobs);
    DELETE FROM bsup.event t WHERE t.job_id = ANY (p_jobs);
    DELETE FROM bsup.finished t WHERE t.job_id = ANY (p_jobs);
    DELETE FROM bsup.job t WHERE t.id = ANY (p_jobs);
END $$;

REVOKE ALL ON bsup.attempt FROM PUBLIC;
REVOKE ALL ON FUNCTION
    bsup.supersede_attempt(),
    bsup.end_leases(uuid, text, bigint[], bigint[], integer[], text[], smallint[], smallint[], text[], text[],
                    double precision[], timestamptz[], timestamptz[], jsonb, boolean),
    bsup.end_otherwise(uuid, text, tid[], bigint[], text[], smallint[], smallint[], text[], text[], double precision[],
                       timestamptz[], timestamptz[]),
    bsup.read_back(uuid, bigint[], bigint[], integer[], bigint[]),
    bsup.finish_batch(uuid, uuid, bigint[], bigint[], integer[], text[], smallint[], smallint[], text[], text[],
                      double precision[], double precision[], double precision[], jsonb, boolean)
    FROM PUBLIC;
SELECT bsup.grant_roles();
