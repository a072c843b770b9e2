-- oldest: 6
-- What users ask of jobs: stop, retry, delete; and the sweeper. Errors: BS001 no such job (DETAIL: its id), BS002 wrong state
-- (DETAIL: id, COLUMN: state, HINT: the problem). On an error nothing was changed.

CREATE FUNCTION bsup.refuse_job(p_job bigint, p_state text, p_problem text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF p_state IS NULL OR p_state = 'unknown' THEN
        RAISE EXCEPTION USING ERRCODE = 'BS001', MESSAGE = format('no job %s', p_job), DETAIL = p_job::text;
    END IF;
    RAISE EXCEPTION USING
        ERRCODE = 'BS002', MESSAGE = format('job %s is %s: %s', p_job, p_state, p_problem), DETAIL = p_job::text,
        COLUMN = p_state, HINT = p_problem;
END $$;

-- Stops jobs: what does not run is canceled, the host of what runs is told. Returns for each 'canceled', 'stopping', or the
-- final state it already had (then is_over). Asked again, a stop only gets harder: a shorter grace, a kill.
CREATE FUNCTION bsup.stop_jobs(p_jobs bigint[], p_grace double precision, p_kill boolean, p_by text)
RETURNS TABLE (job_id bigint, did text, is_over boolean)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_now constant timestamptz := bsup.clock();
    v_row record;
    v_canceled bigint[] := '{}';
    v_first boolean;
BEGIN
    IF p_grace < 0 OR p_grace > 315360000 THEN
        PERFORM bsup.refuse('grace', 'is out of range', '0 to ten years, in seconds');
    END IF;
    FOR job_id IN SELECT DISTINCT j FROM unnest(p_jobs) j ORDER BY j LOOP
        did := NULL;
        -- It moves between tables while we look; look until it is found.
        FOR i IN 1..100 LOOP
            DELETE FROM bsup.waiting w WHERE w.job_id = stop_jobs.job_id
            RETURNING w.generation, w.need_id, w.revision, w.attempt, w.failures, w.losses, w.releases INTO v_row;
            IF NOT FOUND THEN
                DELETE FROM bsup.ready r WHERE r.job_id = stop_jobs.job_id
                RETURNING r.generation, r.need_id, r.revision, r.attempt, r.failures, r.losses, r.releases INTO v_row;
            END IF;
            IF FOUND THEN
                INSERT INTO bsup.finished (job_id, generation, need_id, state, revision, attempt, failures, losses,
                                           releases, reason, ended_at)
                VALUES (stop_jobs.job_id, v_row.generation, v_row.need_id, 'canceled', v_row.revision + 1, v_row.attempt,
                        v_row.failures, v_row.losses, v_row.releases, 'stop', v_now);
                v_canceled := v_canceled || stop_jobs.job_id;
                did := 'canceled';
                v_first := true;
            ELSE
                SELECT l.stop_at IS NULL INTO v_first FROM bsup.lease l WHERE l.job_id = stop_jobs.job_id
                FOR NO KEY UPDATE;
                IF FOUND THEN
                    UPDATE bsup.lease l
                    SET stop_at = coalesce(l.stop_at, v_now), stop_by = coalesce(l.stop_by, p_by),
                        stop_kill = l.stop_kill OR p_kill,
                        stop_grace = CASE WHEN v_first THEN p_grace ELSE least(l.stop_grace, p_grace) END
                    WHERE l.job_id = stop_jobs.job_id;
                    did := 'stopping';
                ELSE
                    SELECT f.state INTO did FROM bsup.finished f
                    WHERE f.job_id = stop_jobs.job_id AND f.retried_at IS NULL;
                END IF;
            END IF;
            EXIT WHEN did IS NOT NULL OR NOT EXISTS (SELECT FROM bsup.job j WHERE j.id = stop_jobs.job_id);
        END LOOP;
        IF did IS NULL THEN
            PERFORM bsup.refuse_job(job_id, 'unknown', '');
        END IF;
        is_over := did <> 'stopping' AND stop_jobs.job_id <> ALL (v_canceled);
        IF NOT is_over THEN
            INSERT INTO bsup.event (at, job_id, type, detail) VALUES (v_now, stop_jobs.job_id, 'stop', jsonb_build_object(
                'by', p_by, 'grace', p_grace, 'kill', p_kill, 'did', did));
        END IF;
        IF did = 'stopping' THEN
            PERFORM bsup.wake('stop');
        END IF;
        RETURN NEXT;
    END LOOP;
    DELETE FROM bsup.job_secret s WHERE s.job_id = ANY (v_canceled);
    PERFORM bsup.settle('{}', v_canceled);
END $$;

-- Cancels a job: at once if it does not run; its host stops it if it does. Returns what stop_jobs says.
CREATE FUNCTION bsup.cancel(job bigint, grace interval DEFAULT NULL, kill boolean DEFAULT false) RETURNS text
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$ SELECT s.did FROM bsup.stop_jobs(ARRAY[$1], extract(epoch FROM $2)::double precision, coalesce($3, false),
                                       session_user::text) s $$;

-- Opens the next generation of jobs that ended. A parent that ended without success must be among them (or be retried
-- before): else the job would be canceled again at once.
CREATE FUNCTION bsup.retry_jobs(p_jobs bigint[], p_by text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_now constant timestamptz := bsup.clock();
    v_id bigint;
    v_old bsup.finished;
    v_job bsup.job;
    v_parent bigint;
    v_parents bigint[];
    v_live bigint[];
BEGIN
    -- By id, as parents have the lower ones.
    FOR v_id IN SELECT DISTINCT j FROM unnest(p_jobs) j ORDER BY j LOOP
        SELECT * INTO v_old FROM bsup.finished f WHERE f.job_id = v_id AND f.retried_at IS NULL FOR UPDATE;
        IF NOT FOUND THEN
            PERFORM bsup.refuse_job(v_id, bsup.state_of(v_id), 'only a job that has ended can be retried');
        END IF;
        SELECT * INTO STRICT v_job FROM bsup.job j WHERE j.id = v_id;
        IF v_job.has_secrets THEN
            PERFORM bsup.refuse_job(v_id, v_old.state, 'its secrets were deleted when it ended: submit it again');
        END IF;
        v_parents := ARRAY(SELECT e.parent FROM bsup.edge e WHERE e.child = v_id AND NOT e.done);
        v_live := CASE WHEN cardinality(v_parents) > 0 THEN bsup.hold_parents(v_parents) ELSE '{}' END;
        IF v_live IS NULL THEN
            SELECT f.job_id INTO v_parent FROM bsup.finished f
            WHERE f.job_id = ANY (v_parents) AND f.retried_at IS NULL AND f.state <> 'succeeded' ORDER BY 1 LIMIT 1;
            PERFORM bsup.refuse_job(v_id, v_old.state, format('job %s, which it waits for, did not succeed: retry that too',
                                                              v_parent));
        END IF;
        UPDATE bsup.edge e SET done = true WHERE e.child = v_id AND NOT e.done AND e.parent <> ALL (v_live);
        UPDATE bsup.finished f SET retried_at = v_now WHERE f.job_id = v_id AND f.generation = v_old.generation;
        IF cardinality(v_live) > 0 THEN
            INSERT INTO bsup.waiting (job_id, need_id, parents_left, priority, loss_budget, cpu, memory, generation,
                                      revision, attempt, failures, losses, releases)
            VALUES (v_id, v_job.need_id, cardinality(v_live), v_job.priority, v_job.loss_budget, v_job.cpu, v_job.memory,
                    v_old.generation + 1, v_old.revision + 1, v_old.attempt, 0, 0, v_old.releases);
        ELSE
            INSERT INTO bsup.ready (job_id, need_id, priority, loss_budget, cpu, memory, alone, generation, revision,
                                    attempt, failures, losses, releases, ready_at)
            VALUES (v_id, v_job.need_id, v_job.priority, v_job.loss_budget, v_job.cpu, v_job.memory, false,
                    v_old.generation + 1, v_old.revision + 2, v_old.attempt, 0, 0, v_old.releases, v_now);
            PERFORM bsup.wake('ready');
        END IF;
        INSERT INTO bsup.event (at, job_id, type, detail)
        VALUES (v_now, v_id, 'retry', jsonb_build_object('by', p_by, 'generation', v_old.generation + 1));
    END LOOP;
END $$;

-- Deletes all rows of jobs whose finished row the caller holds locked.
CREATE FUNCTION bsup.forget(p_jobs bigint[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM bsup.log_chunk t WHERE t.job_id = ANY (p_jobs);
    DELETE FROM bsup.log t WHERE t.job_id = ANY (p_jobs);
    DELETE FROM bsup.step t WHERE t.job_id = ANY (p_jobs);
    DELETE FROM bsup.attempt t WHERE t.job_id = ANY (p_jobs);
    DELETE FROM bsup.edge t WHERE t.parent = ANY (p_jobs);
    DELETE FROM bsup.edge t WHERE t.child = ANY (p_jobs);
    DELETE FROM bsup.submission_key t WHERE t.job_id = ANY (p_jobs);
    DELETE FROM bsup.job_secret t WHERE t.job_id = ANY (p_jobs);
    DELETE FROM bsup.event t WHERE t.job_id = ANY (p_jobs);
    DELETE FROM bsup.finished t WHERE t.job_id = ANY (p_jobs);
    DELETE FROM bsup.job t WHERE t.id = ANY (p_jobs);
END $$;

CREATE FUNCTION bsup.delete_jobs(p_jobs bigint[], p_by text) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_jobs constant bigint[] := ARRAY(SELECT DISTINCT j FROM unnest(p_jobs) j ORDER BY j);
    v_held bigint[];
    v_id bigint;
BEGIN
    v_held := ARRAY(SELECT f.job_id FROM bsup.finished f
                    WHERE f.job_id = ANY (v_jobs) AND f.retried_at IS NULL ORDER BY f.job_id FOR UPDATE);
    SELECT j INTO v_id FROM unnest(v_jobs) j WHERE j <> ALL (v_held) ORDER BY j LIMIT 1;
    IF FOUND THEN
        PERFORM bsup.refuse_job(v_id, bsup.state_of(v_id), 'only a job that has ended can be deleted: stop it first');
    END IF;
    PERFORM bsup.forget(v_held);
    INSERT INTO bsup.event (job_id, type, detail)
    SELECT j, 'delete', jsonb_build_object('by', p_by) FROM unnest(v_held) j;
    RETURN cardinality(v_held);
END $$;

-- Deletes jobs that ended longer ago than p_retention seconds, and events of that age that belong to no job any more.
CREATE FUNCTION bsup.sweep(p_retention double precision, p_limit integer) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    v_before constant timestamptz := bsup.clock() - make_interval(secs => p_retention);
    v_jobs bigint[];
BEGIN
    v_jobs := ARRAY(SELECT f.job_id FROM bsup.finished f WHERE f.recorded_at < v_before AND f.retried_at IS NULL
                    ORDER BY f.recorded_at LIMIT p_limit FOR UPDATE SKIP LOCKED);
    PERFORM bsup.forget(v_jobs);
    DELETE FROM bsup.event e WHERE e.id = ANY (ARRAY(
        SELECT o.id FROM bsup.event o
        WHERE o.at < v_before AND NOT EXISTS (SELECT FROM bsup.job j WHERE j.id = o.job_id)
        ORDER BY o.id LIMIT p_limit));
    RETURN cardinality(v_jobs);
END $$;

-- Appends chunks, each fenced by its lease: in lease for that attempt, or that of the attempt's row (one that ended or was
-- lost keeps its log). The log's size is compared and set, so that chunks are contiguous whoever writes. Returns for each
-- whether it is stored (now or before); stored is null where it does not begin at the log's end, with that end.
CREATE FUNCTION bsup.append_log(
    p_sessions uuid[], p_counters bigint[], p_jobs bigint[], p_attempts integer[], p_offsets bigint[], p_lengths bigint[],
    p_data bytea[]
) RETURNS TABLE (ord bigint, stored boolean, size bigint)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    c record;
BEGIN
    -- In the order of the rows it locks.
    FOR c IN
        SELECT i.* FROM unnest(p_sessions, p_counters, p_jobs, p_attempts, p_offsets, p_lengths, p_data) WITH ORDINALITY
            AS i (session, counter, job_id, attempt, offset_, length, data, ord)
        ORDER BY i.job_id, i.attempt, i.offset_, i.ord
    LOOP
        ord := c.ord;
        stored := false;
        size := 0;
        IF EXISTS (SELECT FROM bsup.lease l WHERE l.session = c.session AND l.counter = c.counter
                   AND l.job_id = c.job_id AND l.attempt = c.attempt)
            OR EXISTS (SELECT FROM bsup.attempt a WHERE a.job_id = c.job_id AND a.attempt = c.attempt
                       AND a.session = c.session AND a.counter = c.counter)
        THEN
            IF c.offset_ = 0 THEN
                INSERT INTO bsup.log (job_id, attempt, size) VALUES (c.job_id, c.attempt, 0) ON CONFLICT DO NOTHING;
            END IF;
            UPDATE bsup.log g SET size = g.size + c.length
            WHERE g.job_id = c.job_id AND g.attempt = c.attempt AND g.size = c.offset_ AND c.length > 0
            RETURNING g.size INTO size;
            IF FOUND THEN
                INSERT INTO bsup.log_chunk (job_id, attempt, offset_, length, data)
                VALUES (c.job_id, c.attempt, c.offset_, c.length, c.data);
                stored := true;
            ELSE
                SELECT g.size INTO size FROM bsup.log g WHERE g.job_id = c.job_id AND g.attempt = c.attempt;
                size := coalesce(size, 0);
                stored := CASE WHEN c.offset_ + c.length <= size THEN true END;
            END IF;
        END IF;
        RETURN NEXT;
    END LOOP;
END $$;
