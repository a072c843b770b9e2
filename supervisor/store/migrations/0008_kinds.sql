-- oldest: 7
-- Kinds beside `steps`: functions that a host's daemon runs itself, called with `args`. Hosts add theirs when they begin.

ALTER TABLE bsup.kind ADD CHECK (name ~ '^[a-z][a-z0-9_.-]{0,63}$');
INSERT INTO bsup.kind (name) VALUES ('noop') ON CONFLICT DO NOTHING;

ALTER FUNCTION bsup.normalize(jsonb) RENAME TO spec_steps_job;

-- The canonical spec of a job of another kind than `steps`, as supervisor/model/spec_task.py makes it. The caller has
-- looked at kind and size.
CREATE FUNCTION bsup.spec_task_job(raw jsonb) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    args jsonb := bsup.spec_get(raw, 'args');
    redact jsonb := bsup.spec_get(raw, 'redact');
    secrets jsonb := bsup.spec_get(raw, 'secrets');
    job jsonb;
BEGIN
    PERFORM bsup.spec_object(raw, '', '{args,attempts,backoff,cpu,kind,labels,memory,name,priority,redact,secrets,timeout}');
    IF args IS NOT NULL THEN
        PERFORM bsup.spec_object(args, 'args', NULL, 'an object of JSON');
        IF jsonb_path_exists(args, '$.**{8 to last}') THEN
            PERFORM bsup.refuse('args', 'is nested too deep', 'at most 7 levels');
        ELSIF jsonb_path_exists(args, '$.** ? (@ > 1.7976931348623157e308 || @ < -1.7976931348623157e308)') THEN
            PERFORM bsup.refuse('args', 'holds a number out of range', 'numbers that a double can express');
        END IF;
    END IF;
    IF redact IS NOT NULL THEN
        PERFORM bsup.spec_redact(redact);
    END IF;
    job := jsonb_build_object(
        'kind', raw -> 'kind',
        'name', coalesce(bsup.spec_name(bsup.spec_text(raw, 'name', 'name'), 'name'), raw ->> 'kind'),
        'labels', nullif(to_jsonb(bsup.spec_labels(raw)), '[]'),
        'priority', nullif(bsup.spec_number(raw, 'priority', 'priority', 0, 255, true), 127),
        'timeout', bsup.spec_duration(raw, 'timeout', 'timeout', false),
        'attempts', nullif(bsup.spec_number(raw, 'attempts', 'attempts', 1, 1000, true), 1),
        'backoff', nullif(bsup.spec_duration(raw, 'backoff', 'backoff', true), 10),
        'cpu', nullif(bsup.spec_number(raw, 'cpu', 'cpu', 0, 4096, false), 0),
        'memory', nullif(bsup.spec_size(raw, 'memory', 'memory'), 0),
        'secrets', CASE WHEN secrets IS NOT NULL THEN nullif(bsup.spec_env(secrets, 'secrets', true), '{}') END,
        'redact', nullif(redact, '{}'));
    IF (job ->> 'backoff')::double precision > 600 THEN
        PERFORM bsup.refuse('backoff', 'is too long', 'at most 600 seconds');
    END IF;
    -- Not with the rest: a null in `args` is a value.
    RETURN jsonb_strip_nulls(job) || CASE WHEN args <> '{}' THEN jsonb_build_object('args', args) ELSE '{}' END;
END $$;

CREATE FUNCTION bsup.spec_redact(redact jsonb) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM bsup.spec_object(redact, 'redact', NULL, 'a mapping of values to replacements');
    IF redact ? '' THEN
        PERFORM bsup.refuse('redact', 'holds an empty value', 'values of one or more characters');
    ELSIF EXISTS (SELECT FROM jsonb_each(redact) e WHERE jsonb_typeof(e.value) <> 'string') THEN
        PERFORM bsup.refuse('redact', 'holds a replacement that is not text', 'text');
    END IF;
END $$;

-- The labels that a job asks for, in order and once each.
CREATE FUNCTION bsup.spec_labels(raw jsonb) RETURNS text[]
LANGUAGE plpgsql AS $$
DECLARE
    labels text[] := bsup.spec_texts(raw, 'labels', 'labels');
    i bigint;
BEGIN
    IF labels IS NULL THEN
        RETURN '{}';
    END IF;
    SELECT ord INTO i FROM unnest(labels) WITH ORDINALITY AS l(label, ord)
    WHERE label !~ '^[A-Za-z0-9][A-Za-z0-9._/:=+-]{0,127}$' LIMIT 1;
    IF FOUND THEN
        PERFORM bsup.refuse(format('labels[%s]', i - 1), 'is not a label',
                            'letters, digits and . _ / : = + -, like arch=amd64');
    END IF;
    labels := ARRAY(SELECT DISTINCT l COLLATE "C" FROM unnest(labels) l ORDER BY 1);
    IF cardinality(labels) > 64 THEN
        PERFORM bsup.refuse('labels', format('has %s labels', cardinality(labels)), 'at most 64');
    END IF;
    RETURN labels;
END $$;

-- The canonical spec, with the values of its secrets: keys in the job file's words, defaults left out.
CREATE FUNCTION bsup.normalize(raw jsonb) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    kind text;
BEGIN
    IF jsonb_typeof(raw) IS DISTINCT FROM 'object' THEN
        PERFORM bsup.refuse('job', 'is not a mapping of keys to values', 'an object');
    END IF;
    kind := bsup.spec_text(raw, 'kind', 'kind');
    IF kind IS NULL OR kind = 'steps' THEN
        RETURN bsup.spec_steps_job(raw);
    ELSIF octet_length(raw::text) > 16777216 THEN
        PERFORM bsup.refuse('job', 'is too large', 'at most 16 MiB');
    ELSIF NOT EXISTS (SELECT FROM bsup.kind k WHERE k.name = kind) THEN
        PERFORM bsup.refuse('kind', format('there is no kind ''%s''', left(kind, 64)),
                            (SELECT string_agg(k.name, ', ' ORDER BY k.name COLLATE "C") FROM bsup.kind k));
    END IF;
    RETURN bsup.spec_task_job(raw);
END $$;

-- As before, but for a job without steps of its own.
CREATE OR REPLACE FUNCTION bsup.submit_as(p_spec jsonb, p_key text, p_after bigint[], p_submitter text) RETURNS bigint
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
        coalesce(jsonb_array_length(v_spec -> 'steps'), 0) + CASE WHEN v_spec ?| '{repository,files}' THEN 1 ELSE 0 END,
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

REVOKE ALL ON FUNCTION bsup.spec_task_job(jsonb), bsup.spec_redact(jsonb), bsup.spec_labels(jsonb), bsup.normalize(jsonb)
    FROM PUBLIC;
SELECT bsup.grant_roles();
