-- oldest: 10
-- What is under way when something changes: a completion while its session is taken up by another daemon, and a pass of the
-- reaper while the clock steps back. Both were found by tests/model.

-- A holder's completions, for the incarnation that holds the session (BS003: it doesn't). Returns as end_attempts, but only
-- what can't be guessed: an attempt that is not returned was recorded, and its job is in the state of its outcome's name.
-- p_started, p_ended: seconds since 1970. A repeat within one call is refused by the caller.
-- The session's key is held, as by a claim, against whoever takes the session up: a completion that waits for a lease's lock
-- would otherwise end it after the daemon that follows has found it held, and begun it.
CREATE OR REPLACE FUNCTION bsup.finish_batch(
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
    SELECT s.host INTO v_host FROM bsup.session s WHERE s.id = p_session AND s.incarnation = p_incarnation
    FOR KEY SHARE;
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

-- One pass of the reaper: takes dead sessions' leases, at most p_limit, and readies what is due. An old pulse counts as
-- none: what it would have noticed, nobody has yet. A session must have expired by the clock as it is when its row is locked,
-- too: v_now is ahead of that where the clock has stepped back since.
CREATE OR REPLACE FUNCTION bsup.reap(p_limit integer)
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
            WHERE s.expires_at < least(v_now, bsup.clock()) ORDER BY s.expires_at FOR UPDATE SKIP LOCKED
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
