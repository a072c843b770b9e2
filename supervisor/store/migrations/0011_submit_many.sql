-- oldest: 10
-- Many jobs by one call: what they have in common is checked once, and their rows are written by a statement a table. And
-- one job by one call with fewer steps: each costs much where a transaction is short.

-- The jobs of a key that stands for a batch; job_id is the first of them.
ALTER TABLE bsup.submission_key ADD COLUMN jobs bigint[];

CREATE FUNCTION bsup.spec_args(args jsonb, field text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM bsup.spec_object(args, field, NULL, 'an object of JSON');
    IF pg_column_size(args) > 16777216 THEN
        PERFORM bsup.refuse(field, 'is too large', 'at most 16 MiB');
    ELSIF jsonb_path_exists(args, '$.**{8 to last}') THEN
        PERFORM bsup.refuse(field, 'is nested too deep', 'at most 7 levels');
    ELSIF jsonb_path_exists(args, '$.** ? (@ > 1.7976931348623157e308 || @ < -1.7976931348623157e308)') THEN
        PERFORM bsup.refuse(field, 'holds a number out of range', 'numbers that a double can express');
    END IF;
END $$;

-- Whether spec_args takes it: one look each at many. Eight levels take 64 bytes at least, a number that is too large 300
-- digits. STABLE, as pg_column_size is: only so is it inlined.
CREATE FUNCTION bsup.are_args(args jsonb) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT jsonb_typeof(args) = 'object' AND pg_column_size(args) <= 16777216
        AND (pg_column_size(args) < 64 OR NOT jsonb_path_exists(args, '$.**{8 to last}'))
        AND (octet_length(args::text) < 300 OR NOT jsonb_path_exists(
            args, '$.** ? (@ > 1.7976931348623157e308 || @ < -1.7976931348623157e308)'))
$$;

-- Whether spec_name would give it back as it is; it may do so for others too.
CREATE FUNCTION bsup.is_plain_name(name jsonb) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT jsonb_typeof(name) = 'string' AND name #>> '{}' ~ '^[!-~]([ -~]{0,62}[!-~])?$'
$$;

CREATE OR REPLACE FUNCTION bsup.spec_task_job(raw jsonb) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    args jsonb := bsup.spec_get(raw, 'args');
    redact jsonb := bsup.spec_get(raw, 'redact');
    secrets jsonb := bsup.spec_get(raw, 'secrets');
    job jsonb;
BEGIN
    PERFORM bsup.spec_object(raw, '', '{args,attempts,backoff,cpu,kind,labels,memory,name,priority,redact,secrets,timeout}');
    IF args IS NOT NULL THEN
        PERFORM bsup.spec_args(args, 'args');
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

CREATE OR REPLACE FUNCTION bsup.normalize(raw jsonb) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    kind text := raw ->> 'kind';
BEGIN
    -- Most have no other keys, and nothing in them that takes a closer look.
    IF jsonb_typeof(raw) = 'object' AND kind <> 'steps' THEN
        IF raw - '{kind,name,args}'::text[] = '{}' AND coalesce(bsup.is_plain_name(raw -> 'name'), true)
            AND coalesce(bsup.are_args(raw -> 'args'), true) THEN
            PERFORM FROM bsup.kind k WHERE k.name = kind;
            IF FOUND THEN
                RETURN jsonb_build_object('kind', kind, 'name', coalesce(raw ->> 'name', kind))
                    || CASE WHEN raw -> 'args' <> '{}' THEN jsonb_build_object('args', raw -> 'args') ELSE '{}' END;
            END IF;
        END IF;
    END IF;
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

-- Claims a key for new jobs; the ids of the jobs that it was used for before, or null: it is new. p_digest: of all that is
-- asked for.
CREATE FUNCTION bsup.take_key(p_key text, p_digest bytea, p_jobs bigint[]) RETURNS bigint[]
LANGUAGE plpgsql AS $$
DECLARE
    v_known bsup.submission_key;
BEGIN
    IF p_key = '' OR length(p_key) > 255 THEN
        PERFORM bsup.refuse('key', 'is empty or too long', '1 to 255 characters');
    END IF;
    INSERT INTO bsup.submission_key (key, job_id, digest, jobs)
    VALUES (p_key, p_jobs[1], p_digest, CASE WHEN cardinality(p_jobs) > 1 THEN p_jobs END) ON CONFLICT DO NOTHING;
    IF FOUND THEN
        RETURN NULL;
    END IF;
    SELECT * INTO v_known FROM bsup.submission_key k WHERE k.key = p_key;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the job of this key is just being deleted: try again' USING ERRCODE = '40001';
    ELSIF v_known.digest <> p_digest THEN
        PERFORM bsup.refuse('key', format('was used for job %s, which is different', v_known.job_id),
                            'a new key, or the same job again');
    END IF;
    RETURN coalesce(v_known.jobs, ARRAY[v_known.job_id]);
END $$;

-- What a canonical spec has to say to bsup.job_secret.
CREATE FUNCTION bsup.secrets_of(spec jsonb) RETURNS TABLE (name text, value text, replacement text)
LANGUAGE sql IMMUTABLE AS $$
    SELECT e.key, e.value, NULL FROM jsonb_each_text(spec -> 'secrets') e
    UNION ALL
    SELECT NULL, e.key, e.value FROM jsonb_each_text(spec -> 'redact') e
$$;

-- The row of a job with this canonical spec, but for its id. Its spec names secrets only.
CREATE FUNCTION bsup.job_like(p_spec jsonb, p_need integer, p_kind bsup.kind, p_submitter text, p_now timestamptz)
RETURNS bsup.job
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN ROW(
        NULL::bigint, p_need, coalesce((p_spec -> 'priority')::smallint, p_kind.priority),
        coalesce((p_spec -> 'attempts')::smallint, p_kind.attempts), p_kind.loss_budget,
        (coalesce(jsonb_array_length(p_spec -> 'steps'), 0)
         + CASE WHEN p_spec ?| '{repository,files}' THEN 1 ELSE 0 END)::smallint,
        p_spec ?| '{secrets,redact}', coalesce((p_spec -> 'cpu')::real, 0), coalesce((p_spec -> 'memory')::bigint, 0), p_now,
        p_spec ->> 'name', p_submitter,
        CASE WHEN p_spec ?| '{secrets,redact}' THEN bsup.shown(p_spec) ELSE p_spec END)::bsup.job;
END $$;

CREATE FUNCTION bsup.shown(spec jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE AS $$
    SELECT (spec - 'redact') || CASE WHEN spec ? 'secrets' THEN jsonb_build_object('secrets', ARRAY(
        SELECT k COLLATE "C" FROM jsonb_object_keys(spec -> 'secrets') k ORDER BY 1)) ELSE '{}' END
$$;

CREATE OR REPLACE FUNCTION bsup.submit_as(p_spec jsonb, p_key text, p_after bigint[], p_submitter text) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_now constant timestamptz := bsup.clock();
    v_spec jsonb := bsup.normalize(p_spec);
    v_after bigint[] := ARRAY(SELECT DISTINCT a FROM unnest(p_after) a ORDER BY a);
    v_known bigint[];
    v_id bigint := nextval('bsup.job_id_seq');
    v_old bigint;
    v_kind bsup.kind;
    v_need integer;
    v_live bigint[] := '{}';
    v_job bsup.job;
BEGIN
    IF p_key IS NOT NULL THEN
        v_known := bsup.take_key(p_key, sha256(convert_to(v_spec::text || v_after::text, 'UTF8')), ARRAY[v_id]);
        IF v_known IS NOT NULL THEN
            RETURN v_known[1];
        END IF;
    END IF;
    IF cardinality(v_after) > 1000 THEN
        PERFORM bsup.refuse('after', format('has %s jobs', cardinality(v_after)), 'at most 1000');
    ELSIF cardinality(v_after) > 0 THEN
        SELECT a INTO v_old FROM unnest(v_after) a WHERE NOT EXISTS (SELECT FROM bsup.job j WHERE j.id = a) LIMIT 1;
        IF FOUND THEN
            PERFORM bsup.refuse('after', format('there is no job %s', v_old), 'ids of jobs');
        END IF;
        v_live := bsup.hold_parents(v_after);
    END IF;
    SELECT * INTO STRICT v_kind FROM bsup.kind k WHERE k.name = v_spec ->> 'kind';
    v_need := bsup.intern_need(v_kind.name,
                               ARRAY(SELECT jsonb_array_elements_text(coalesce(v_spec -> 'labels', '[]'))));
    v_job := bsup.job_like(v_spec, v_need, v_kind, p_submitter, v_now);
    v_job.id := v_id;
    INSERT INTO bsup.job OVERRIDING SYSTEM VALUE SELECT v_job.*;
    IF cardinality(v_after) > 0 THEN
        INSERT INTO bsup.edge (parent, child, done)
        SELECT a, v_id, NOT coalesce(a = ANY (v_live), true) FROM unnest(v_after) a ORDER BY a;
    END IF;
    IF v_live IS NULL THEN
        INSERT INTO bsup.finished (job_id, generation, need_id, state, revision, attempt, failures, losses, releases,
                                   reason, ended_at)
        VALUES (v_id, 1, v_need, 'canceled', 2, 0, 0, 0, 0, 'upstream', v_now);
        RETURN v_id;
    END IF;
    IF v_job.has_secrets THEN
        INSERT INTO bsup.job_secret (job_id, name, value, replacement)
        SELECT v_id, s.name, s.value, s.replacement FROM bsup.secrets_of(v_spec) s;
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

-- A canonical spec with a job's own name and args, where it has them. STABLE, so that it is inlined.
CREATE FUNCTION bsup.own_spec(spec jsonb, name text, args jsonb) RETURNS jsonb
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN name IS NULL AND (args IS NULL OR args = '{}') THEN spec
                WHEN name IS NULL THEN jsonb_set(spec, '{args}', args)
                WHEN args IS NULL OR args = '{}' THEN jsonb_set(spec, '{name}', to_jsonb(name))
                ELSE jsonb_set(jsonb_set(spec, '{name}', to_jsonb(name)), '{args}', args) END
$$;

-- Inserts jobs that are ready at once: one for each element of p_shape, which names one of p_specs (canonical, with the
-- values of secrets), with the name and the args beside it, if any, for its own. Returns their ids, in order.
CREATE FUNCTION bsup.insert_jobs(
    p_specs jsonb[], p_shape integer[], p_names text[], p_args jsonb[], p_key text, p_submitter text
) RETURNS bigint[]
LANGUAGE plpgsql AS $$
DECLARE
    v_now constant timestamptz := bsup.clock();
    v_like bsup.job[];
    v_one bsup.job;
    v_kind bsup.kind;
    v_spec jsonb;
    v_ids bigint[];
    v_known bigint[];
BEGIN
    v_ids := ARRAY(SELECT nextval('bsup.job_id_seq') FROM generate_series(1, cardinality(p_shape)));
    IF p_key IS NOT NULL THEN
        SELECT bsup.take_key(p_key, sha256(convert_to(string_agg(x.job::text, '' ORDER BY x.ord), 'UTF8')), v_ids)
        INTO v_known
        FROM (
            SELECT jsonb_build_array(s.spec - 'name', coalesce(i.name, s.spec ->> 'name'), nullif(i.args, '{}')) AS job, i.ord
            FROM unnest(p_shape, p_names, p_args) WITH ORDINALITY AS i (shape, name, args, ord)
            JOIN unnest(p_specs) WITH ORDINALITY AS s (spec, number) ON s.number = i.shape
        ) x;
        IF v_known IS NOT NULL THEN
            RETURN v_known;
        END IF;
    END IF;
    FOREACH v_spec IN ARRAY p_specs LOOP
        SELECT * INTO STRICT v_kind FROM bsup.kind k WHERE k.name = v_spec ->> 'kind';
        v_like := v_like || bsup.job_like(
            v_spec, bsup.intern_need(v_kind.name, ARRAY(SELECT jsonb_array_elements_text(coalesce(v_spec -> 'labels', '[]')))),
            v_kind, p_submitter, v_now);
    END LOOP;
    IF cardinality(v_like) = 1 THEN
        -- As below; the join would be a tenth of it.
        v_one := v_like[1];
        INSERT INTO bsup.job (id, need_id, priority, attempts, loss_budget, steps_total, has_secrets, cpu, memory,
                              submitted_at, name, submitter, spec)
        OVERRIDING SYSTEM VALUE
        SELECT i.id, v_one.need_id, v_one.priority, v_one.attempts, v_one.loss_budget, v_one.steps_total, v_one.has_secrets,
               v_one.cpu, v_one.memory, v_now, coalesce(i.name, v_one.name), p_submitter,
               bsup.own_spec(v_one.spec, i.name, i.args)
        FROM unnest(v_ids, p_names, p_args) AS i (id, name, args);
        INSERT INTO bsup.ready (job_id, need_id, priority, loss_budget, cpu, memory, alone, generation, revision, attempt,
                                failures, losses, releases, ready_at)
        SELECT i, v_one.need_id, v_one.priority, v_one.loss_budget, v_one.cpu, v_one.memory, false, 1, 2, 0, 0, 0, 0, v_now
        FROM unnest(v_ids) i;
    ELSE
        INSERT INTO bsup.job (id, need_id, priority, attempts, loss_budget, steps_total, has_secrets, cpu, memory,
                              submitted_at, name, submitter, spec)
        OVERRIDING SYSTEM VALUE
        SELECT i.id, s.need_id, s.priority, s.attempts, s.loss_budget, s.steps_total, s.has_secrets, s.cpu, s.memory, v_now,
               coalesce(i.name, s.name), p_submitter, bsup.own_spec(s.spec, i.name, i.args)
        FROM unnest(v_ids, p_shape, p_names, p_args) AS i (id, shape, name, args)
        JOIN unnest(v_like) WITH ORDINALITY AS s ON s.ordinality = i.shape;
        INSERT INTO bsup.ready (job_id, need_id, priority, loss_budget, cpu, memory, alone, generation, revision, attempt,
                                failures, losses, releases, ready_at)
        SELECT i.id, s.need_id, s.priority, s.loss_budget, s.cpu, s.memory, false, 1, 2, 0, 0, 0, 0, v_now
        FROM unnest(v_ids, p_shape) AS i (id, shape)
        JOIN unnest(v_like) WITH ORDINALITY AS s ON s.ordinality = i.shape;
    END IF;
    IF EXISTS (SELECT FROM unnest(v_like) s WHERE s.has_secrets) THEN
        INSERT INTO bsup.job_secret (job_id, name, value, replacement)
        SELECT i.id, x.name, x.value, x.replacement
        FROM unnest(v_ids, p_shape) AS i (id, shape)
        JOIN unnest(p_specs) WITH ORDINALITY AS s (spec, number) ON s.number = i.shape
        CROSS JOIN LATERAL bsup.secrets_of(s.spec) x;
    END IF;
    PERFORM bsup.wake('ready');
    RETURN v_ids;
END $$;

-- Names and args differ most between the jobs of one call: they are checked for each. Of the rest there are few shapes, each
-- checked once. A job of steps has no args.
CREATE FUNCTION bsup.submit_many_as(p_jobs jsonb, p_key text, p_submitter text) RETURNS bigint[]
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_rest jsonb[];
    v_raw_names jsonb[];
    v_names text[];
    v_args jsonb[];
    v_shapes jsonb[];
    v_firsts bigint[];
    v_specs jsonb[];
    v_shape integer[];
    v_at bigint;
    v_field text;
    v_problem text;
    v_allowed text;
BEGIN
    IF jsonb_typeof(p_jobs) IS DISTINCT FROM 'array' THEN
        PERFORM bsup.refuse('jobs', 'is not a list', 'a list of jobs');
    ELSIF jsonb_array_length(p_jobs) > 100000 THEN
        PERFORM bsup.refuse('jobs', format('has %s jobs', jsonb_array_length(p_jobs)), 'at most 100000');
    ELSIF jsonb_array_length(p_jobs) = 0 THEN
        RETURN '{}';
    END IF;
    SELECT array_agg(CASE WHEN i.has_name AND i.has_args THEN i.job - '{name,args}'::text[] WHEN i.has_args THEN i.job - 'args'
                          WHEN i.has_name THEN i.job - 'name' ELSE i.job END),
           CASE WHEN bool_or(i.has_name) THEN array_agg(CASE WHEN i.has_name THEN nullif(i.job -> 'name', 'null') END) END,
           CASE WHEN bool_or(i.has_args) THEN
               array_agg(CASE WHEN i.has_args THEN nullif(i.job -> 'args', 'null') END) END
    INTO v_rest, v_raw_names, v_args
    FROM (
        SELECT e.job, jsonb_typeof(e.job) = 'object' AND e.job ? 'name' AS has_name,
               jsonb_typeof(e.job) = 'object' AND e.job ? 'args' AND e.job ->> 'kind' <> 'steps' AS has_args
        FROM jsonb_array_elements(p_jobs) WITH ORDINALITY AS e (job, ord) ORDER BY e.ord
    ) i;
    SELECT array_agg(s.rest ORDER BY s.ord), array_agg(s.ord ORDER BY s.ord) INTO v_shapes, v_firsts
    FROM (SELECT r.rest, min(r.ord) AS ord FROM unnest(v_rest) WITH ORDINALITY AS r (rest, ord) GROUP BY r.rest) s;
    BEGIN
        FOR i IN 1..cardinality(v_shapes) LOOP
            v_at := v_firsts[i] - 1;
            v_specs := v_specs || bsup.normalize(v_shapes[i]);
        END LOOP;
    EXCEPTION WHEN invalid_parameter_value THEN
        GET STACKED DIAGNOSTICS v_field = COLUMN_NAME, v_problem = PG_EXCEPTION_DETAIL, v_allowed = PG_EXCEPTION_HINT;
        PERFORM bsup.refuse(format('jobs[%s]', v_at) || CASE v_field WHEN 'job' THEN '' ELSE '.' || v_field END,
                            v_problem, v_allowed);
    END;
    IF v_raw_names IS NOT NULL THEN
        v_names := ARRAY(
            SELECT CASE WHEN r.name IS NULL OR bsup.is_plain_name(r.name) THEN r.name #>> '{}'
                        ELSE bsup.spec_name(bsup.spec_text(jsonb_build_object('name', r.name), 'name', f.field), f.field) END
            FROM unnest(v_raw_names) WITH ORDINALITY AS r (name, ord)
            CROSS JOIN LATERAL format('jobs[%s].name', r.ord - 1) AS f (field) ORDER BY r.ord);
    END IF;
    PERFORM bsup.spec_args(a.args, format('jobs[%s].args', a.ord - 1))
    FROM unnest(v_args) WITH ORDINALITY AS a (args, ord) WHERE NOT bsup.are_args(a.args);
    IF cardinality(v_shapes) = 1 THEN
        v_shape := array_fill(1, ARRAY[cardinality(v_rest)]);
    ELSE
        SELECT array_agg(s.number ORDER BY r.ord) INTO v_shape
        FROM unnest(v_rest) WITH ORDINALITY AS r (rest, ord)
        JOIN unnest(v_shapes) WITH ORDINALITY AS s (rest, number) ON s.rest = r.rest;
    END IF;
    RETURN bsup.insert_jobs(v_specs, v_shape, v_names, v_args, p_key, p_submitter);
END $$;

CREATE FUNCTION bsup.submit_many_as(p_spec jsonb, p_args jsonb[], p_key text, p_submitter text) RETURNS bigint[]
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF p_args IS NULL OR array_ndims(p_args) > 1 THEN
        PERFORM bsup.refuse('args', 'is not a list', 'a list of objects of JSON, one for each job');
    ELSIF cardinality(p_args) > 100000 THEN
        PERFORM bsup.refuse('args', format('has %s jobs', cardinality(p_args)), 'at most 100000');
    ELSIF cardinality(p_args) = 0 THEN
        RETURN '{}';
    ELSIF jsonb_typeof(p_spec) = 'object' AND p_spec ->> 'kind' = 'steps' THEN
        PERFORM bsup.refuse('kind', 'takes no args', 'a kind other than steps');
    ELSIF jsonb_typeof(p_spec) = 'object' AND p_spec ? 'args' THEN
        PERFORM bsup.refuse('args', 'is given twice', 'beside the spec only');
    END IF;
    PERFORM bsup.spec_args(a.args, format('args[%s]', a.ord - 1))
    FROM unnest(p_args) WITH ORDINALITY AS a (args, ord) WHERE NOT bsup.are_args(a.args);
    RETURN bsup.insert_jobs(ARRAY[bsup.normalize(p_spec)], array_fill(1, ARRAY[cardinality(p_args)]), NULL, p_args, p_key,
                            p_submitter);
END $$;

-- Submits jobs, all or none, and returns their ids in order. jobs: a list of specs. key: a repeat with the same key and
-- content returns the first ones' ids. An error names the job: `jobs[17].priority: …`.
CREATE FUNCTION bsup.submit_many(jobs jsonb, key text DEFAULT NULL) RETURNS bigint[]
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$ BEGIN RETURN bsup.submit_many_as($1, $2, session_user::text); END $$;

-- The same for jobs that differ in their args alone: one for each of args (null: none). An error in one names it: `args[17]`.
CREATE FUNCTION bsup.submit_many(spec jsonb, args jsonb[], key text DEFAULT NULL) RETURNS bigint[]
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$ BEGIN RETURN bsup.submit_many_as($1, $2, $3, session_user::text); END $$;

-- As before; in PL/pgSQL, which keeps its plan from call to call.
CREATE OR REPLACE FUNCTION bsup.submit(spec jsonb, key text DEFAULT NULL, after bigint[] DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$ BEGIN RETURN bsup.submit_as($1, $2, $3, session_user::text); END $$;

CREATE OR REPLACE FUNCTION bsup.grant_roles() RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.rolname = 'bsup_submitter') THEN
        GRANT USAGE ON SCHEMA bsup TO bsup_submitter;
        GRANT EXECUTE ON FUNCTION bsup.submit(jsonb, text, bigint[]), bsup.submit_many(jsonb, text),
            bsup.submit_many(jsonb, jsonb[], text), bsup.cancel(bigint, interval, boolean) TO bsup_submitter;
    END IF;
    IF EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.rolname = 'bsup_reader') THEN
        GRANT USAGE ON SCHEMA bsup TO bsup_reader;
        GRANT SELECT ON bsup.jobs, bsup.job, bsup.need, bsup.kind, bsup.waiting, bsup.ready, bsup.lease, bsup.finished,
            bsup.attempt, bsup.step, bsup.log, bsup.log_chunk, bsup.edge, bsup.event, bsup.pulse, bsup.migration
            TO bsup_reader;
        -- Not the incarnation: it is what a holder shows to write.
        GRANT SELECT (id, epoch, host, labels, slots, cpu, memory, version, term, started_at, renewed_at, expires_at, idle,
            draining, dead_at) ON bsup.session TO bsup_reader;
    END IF;
    IF EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.rolname = 'bsup_host') THEN
        GRANT USAGE ON SCHEMA bsup TO bsup_host;
        GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA bsup TO bsup_host;
        REVOKE INSERT, UPDATE, DELETE ON bsup.migration FROM bsup_host;
        GRANT USAGE ON ALL SEQUENCES IN SCHEMA bsup TO bsup_host;
        GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA bsup TO bsup_host;
        REVOKE EXECUTE ON FUNCTION bsup.grant_roles() FROM bsup_host;
    END IF;
END $$;
REVOKE ALL ON FUNCTION bsup.spec_args(jsonb, text), bsup.are_args(jsonb), bsup.is_plain_name(jsonb),
    bsup.take_key(text, bytea, bigint[]), bsup.secrets_of(jsonb), bsup.shown(jsonb),
    bsup.own_spec(jsonb, text, jsonb), bsup.job_like(jsonb, integer, bsup.kind, text, timestamptz),
    bsup.insert_jobs(jsonb[], integer[], text[], jsonb[], text, text), bsup.submit_many_as(jsonb, text, text),
    bsup.submit_many_as(jsonb, jsonb[], text, text), bsup.submit_many(jsonb, text),
    bsup.submit_many(jsonb, jsonb[], text)
    FROM PUBLIC;
SELECT bsup.grant_roles();
