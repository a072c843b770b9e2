-- oldest: 4
-- Submitting, from any language, in the caller's own transaction.

-- Wakes hosts, once a transaction however often it is called, and only if one said that it waits: NOTIFY serialises
-- commits on a database-wide lock. A host that misses it polls.
CREATE FUNCTION bsup.wake(payload text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF payload = 'stop' OR EXISTS (SELECT FROM bsup.session s WHERE s.idle AND s.expires_at > bsup.clock()) THEN
        PERFORM pg_notify('bsup', payload);
    END IF;
END $$;

-- The id of a kind and the labels it asks for. The lock is held until the commit, so that ids become visible in order:
-- a host asks for those after the last it knows. Taken for label sets never seen before only, which are few.
CREATE FUNCTION bsup.intern_need(p_kind text, p_labels text[]) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    v_id integer;
BEGIN
    SELECT n.id INTO v_id FROM bsup.need n WHERE n.kind = p_kind AND n.labels = p_labels;
    IF v_id IS NULL THEN
        PERFORM pg_advisory_xact_lock(1651733872, 2);
        SELECT n.id INTO v_id FROM bsup.need n WHERE n.kind = p_kind AND n.labels = p_labels;
    END IF;
    IF v_id IS NULL THEN
        INSERT INTO bsup.need (kind, labels) VALUES (p_kind, p_labels) RETURNING id INTO v_id;
    END IF;
    RETURN v_id;
END $$;

-- Those of the parents that have still to end, or null if one ended without success. A parent that lives is locked FOR KEY
-- SHARE until the caller's commit: its completion, which must see the edge, waits for that. A parent moves between
-- tables while we look, so we look again until each is found.
CREATE FUNCTION bsup.hold_parents(p_parents bigint[]) RETURNS bigint[]
LANGUAGE plpgsql AS $$
DECLARE
    v_left bigint[];
    v_found bigint[];
    v_live bigint[] := '{}';
BEGIN
    SELECT array_agg(p ORDER BY p) INTO v_left FROM unnest(p_parents) p;
    FOR i IN 1..100 LOOP
        v_found := ARRAY(SELECT w.job_id FROM bsup.waiting w WHERE w.job_id = ANY (v_left)
                         ORDER BY w.job_id FOR KEY SHARE);
        v_live := v_live || v_found;
        v_left := ARRAY(SELECT p FROM unnest(v_left) p WHERE p <> ALL (v_found));
        v_found := ARRAY(SELECT r.job_id FROM bsup.ready r WHERE r.job_id = ANY (v_left)
                         ORDER BY r.job_id FOR KEY SHARE);
        v_live := v_live || v_found;
        v_left := ARRAY(SELECT p FROM unnest(v_left) p WHERE p <> ALL (v_found));
        v_found := ARRAY(SELECT l.job_id FROM bsup.lease l WHERE l.job_id = ANY (v_left)
                         ORDER BY l.job_id FOR KEY SHARE);
        v_live := v_live || v_found;
        v_left := ARRAY(SELECT p FROM unnest(v_left) p WHERE p <> ALL (v_found));
        IF EXISTS (SELECT FROM bsup.finished f
                   WHERE f.job_id = ANY (v_left) AND f.retried_at IS NULL AND f.state <> 'succeeded') THEN
            RETURN NULL;
        END IF;
        v_left := ARRAY(SELECT p FROM unnest(v_left) p WHERE NOT EXISTS (
            SELECT FROM bsup.finished f WHERE f.job_id = p AND f.retried_at IS NULL));
        IF cardinality(v_left) = 0 THEN
            RETURN v_live;
        END IF;
    END LOOP;
    RAISE EXCEPTION 'the parents of the job move too fast: try again' USING ERRCODE = '40001';
END $$;

CREATE FUNCTION bsup.submit_as(p_spec jsonb, p_key text, p_after bigint[], p_submitter text) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_now constant timestamptz := bsup.clock();
    v_spec jsonb := bsup.normalize(p_spec);
    v_after bigint[] := ARRAY(SELECT DISTINCT a FROM unnest(p_after) a ORDER BY a);
    v_digest bytea;
    v_known bytea;
    v_id bigint := nextval(pg_get_serial_sequence('bsup.job', 'id'));
    v_old bigint;
    v_kind bsup.kind;
    v_need integer;
    v_live bigint[];
    v_secrets boolean := v_spec ? 'secrets' OR v_spec ? 'redact';
    v_job bsup.job;
BEGIN
    IF p_key IS NOT NULL THEN
        IF p_key = '' OR length(p_key) > 255 THEN
            PERFORM bsup.refuse('key', 'is empty or too long', '1 to 255 characters');
        END IF;
        v_digest := sha256(convert_to(v_spec::text || v_after::text, 'UTF8'));
        INSERT INTO bsup.submission_key (key, job_id, digest) VALUES (p_key, v_id, v_digest) ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN
            SELECT k.job_id, k.digest INTO v_old, v_known FROM bsup.submission_key k WHERE k.key = p_key;
            IF v_old IS NULL THEN
                RAISE EXCEPTION 'the job of this key is just being deleted: try again' USING ERRCODE = '40001';
            ELSIF v_known <> v_digest THEN
                PERFORM bsup.refuse('key', format('was used for job %s, which is different', v_old),
                                    'a new key, or the same job again');
            END IF;
            RETURN v_old;
        END IF;
    END IF;
    IF cardinality(v_after) > 1000 THEN
        PERFORM bsup.refuse('after', format('has %s jobs', cardinality(v_after)), 'at most 1000');
    END IF;
    SELECT a INTO v_old FROM unnest(v_after) a WHERE NOT EXISTS (SELECT FROM bsup.job j WHERE j.id = a) LIMIT 1;
    IF FOUND THEN
        PERFORM bsup.refuse('after', format('there is no job %s', v_old), 'ids of jobs');
    END IF;
    v_live := CASE WHEN cardinality(v_after) > 0 THEN bsup.hold_parents(v_after) ELSE '{}' END;
    SELECT * INTO STRICT v_kind FROM bsup.kind k WHERE k.name = v_spec ->> 'kind';
    v_need := bsup.intern_need(v_kind.name,
                               ARRAY(SELECT jsonb_array_elements_text(coalesce(v_spec -> 'labels', '[]'))));
    INSERT INTO bsup.job (id, need_id, priority, attempts, loss_budget, steps_total, has_secrets, cpu, memory,
                          submitted_at, name, submitter, spec)
    OVERRIDING SYSTEM VALUE VALUES (
        v_id, v_need, coalesce((v_spec -> 'priority')::smallint, v_kind.priority),
        coalesce((v_spec -> 'attempts')::smallint, v_kind.attempts), v_kind.loss_budget,
        jsonb_array_length(v_spec -> 'steps') + CASE WHEN v_spec ?| '{repository,files}' THEN 1 ELSE 0 END,
        v_secrets, coalesce((v_spec -> 'cpu')::real, 0), coalesce((v_spec -> 'memory')::bigint, 0), v_now,
        v_spec ->> 'name', p_submitter,
        (v_spec - 'redact') || CASE WHEN v_spec ? 'secrets' THEN jsonb_build_object('secrets', ARRAY(
            SELECT k COLLATE "C" FROM jsonb_object_keys(v_spec -> 'secrets') k ORDER BY 1)) ELSE '{}' END)
    RETURNING * INTO v_job;
    INSERT INTO bsup.edge (parent, child, done)
    SELECT a, v_id, NOT coalesce(a = ANY (v_live), true) FROM unnest(v_after) a ORDER BY a;
    IF v_live IS NULL THEN
        INSERT INTO bsup.finished (job_id, generation, need_id, state, revision, attempt, failures, losses, releases,
                                   reason, ended_at)
        VALUES (v_id, 1, v_need, 'canceled', 2, 0, 0, 0, 0, 'upstream', v_now);
        RETURN v_id;
    END IF;
    IF v_secrets THEN
        INSERT INTO bsup.job_secret (job_id, name, value)
        SELECT v_id, e.key, e.value FROM jsonb_each_text(v_spec -> 'secrets') e;
        INSERT INTO bsup.job_secret (job_id, value, replacement)
        SELECT v_id, e.key, e.value FROM jsonb_each_text(v_spec -> 'redact') e;
    END IF;
    IF cardinality(v_live) > 0 THEN
        INSERT INTO bsup.waiting (job_id, need_id, parents_left, priority, loss_budget, cpu, memory, generation, revision,
                                  attempt, failures, losses, releases)
        VALUES (v_id, v_need, cardinality(v_live), v_job.priority, v_job.loss_budget, v_job.cpu, v_job.memory, 1, 1,
                0, 0, 0, 0);
    ELSE
        INSERT INTO bsup.ready (job_id, need_id, priority, loss_budget, cpu, memory, alone, generation, revision, attempt,
                                failures, losses, releases, ready_at)
        VALUES (v_id, v_need, v_job.priority, v_job.loss_budget, v_job.cpu, v_job.memory, false, 1, 2, 0, 0, 0, 0, v_now);
        PERFORM bsup.wake('ready');
    END IF;
    RETURN v_id;
END $$;

-- Submits a job and returns its id. key: a repeat with the same key and content returns the first one's id. after: jobs
-- that must succeed before; if one has failed or was canceled, the job is canceled at once, reason 'upstream'.
CREATE FUNCTION bsup.submit(spec jsonb, key text DEFAULT NULL, after bigint[] DEFAULT NULL) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$ SELECT bsup.submit_as($1, $2, $3, session_user::text) $$;
