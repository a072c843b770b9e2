-- oldest: 2
-- Checks a job's spec and makes it canonical, as supervisor/model/spec.py does for those who come through a daemon: a
-- submission from any language must not get in what no host could run. What is left to the host's own check when it
-- takes the job: exact Unicode printability, and limits of paths that only a file system knows.
-- Errors have SQLSTATE 22023; MESSAGE is `field: problem (allowed: …)`, COLUMN the field, DETAIL the problem, HINT what
-- is allowed. No error quotes a value that may be secret.

CREATE FUNCTION bsup.refuse(field text, problem text, allowed text DEFAULT '') RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION USING
        ERRCODE = '22023',
        MESSAGE = field || ': ' || problem || CASE WHEN allowed = '' THEN '' ELSE ' (allowed: ' || allowed || ')' END,
        COLUMN = field, DETAIL = problem, HINT = allowed;
END $$;

-- The value of a key; null counts as left out.
CREATE FUNCTION bsup.spec_get(obj jsonb, key text) RETURNS jsonb
LANGUAGE sql IMMUTABLE AS $$ SELECT nullif(obj OPERATOR(pg_catalog.->) key, 'null'::jsonb) $$;

CREATE FUNCTION bsup.spec_object(v jsonb, field text, known text[], allowed text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    k text;
BEGIN
    IF jsonb_typeof(v) IS DISTINCT FROM 'object' THEN
        PERFORM bsup.refuse(coalesce(nullif(field, ''), 'job'), 'is not a mapping',
                            coalesce(allowed, array_to_string(known, ', ')));
    END IF;
    IF known IS NULL THEN
        RETURN;
    END IF;
    FOR k IN SELECT jsonb_object_keys(v) LOOP
        IF k <> ALL (known) THEN
            PERFORM bsup.refuse(CASE WHEN field = '' THEN '' ELSE field || '.' END || coalesce(nullif(left(k, 80), ''), '""'),
                                'is not a known key', array_to_string(known, ', '));
        END IF;
    END LOOP;
END $$;

CREATE FUNCTION bsup.spec_text(obj jsonb, key text, field text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    v jsonb := bsup.spec_get(obj, key);
BEGIN
    IF v IS NOT NULL AND jsonb_typeof(v) <> 'string' THEN
        PERFORM bsup.refuse(field, 'is not text', 'text');
    END IF;
    RETURN v #>> '{}';
END $$;

CREATE FUNCTION bsup.spec_bool(obj jsonb, key text, field text) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    v jsonb := bsup.spec_get(obj, key);
BEGIN
    IF v IS NOT NULL AND jsonb_typeof(v) <> 'boolean' THEN
        PERFORM bsup.refuse(field, 'is not true or false', 'true or false');
    END IF;
    RETURN coalesce(v::boolean, false);
END $$;

CREATE FUNCTION bsup.spec_number(obj jsonb, key text, field text, low numeric, high numeric, whole boolean)
RETURNS numeric LANGUAGE plpgsql AS $$
DECLARE
    v jsonb := bsup.spec_get(obj, key);
    range text := CASE WHEN whole THEN 'a whole number, ' ELSE '' END || low || ' to ' || high;
    n numeric;
BEGIN
    IF v IS NULL THEN
        RETURN NULL;
    END IF;
    IF jsonb_typeof(v) <> 'number' THEN
        PERFORM bsup.refuse(field, 'is not a number', range);
    END IF;
    n := v::numeric;
    IF n < low OR n > high THEN
        PERFORM bsup.refuse(field, 'is out of range', range);
    ELSIF whole AND n <> trunc(n) THEN
        PERFORM bsup.refuse(field, 'is not a whole number', range);
    END IF;
    RETURN n;
END $$;

-- Seconds of a duration: a number, or text like '90s', '1h30m'.
CREATE FUNCTION bsup.spec_duration(obj jsonb, key text, field text, zero boolean) RETURNS double precision
LANGUAGE plpgsql AS $$
DECLARE
    v jsonb := bsup.spec_get(obj, key);
    form constant text := 'seconds as a number, or like "500ms", "90s", "10m", "1h30m", "2d"';
    t text;
    part text[];
    n numeric;
BEGIN
    IF v IS NULL THEN
        RETURN NULL;
    END IF;
    IF jsonb_typeof(v) = 'number' THEN
        n := v::numeric;
    ELSIF jsonb_typeof(v) = 'string' AND length(v #>> '{}') <= 128 THEN
        t := replace(v #>> '{}', ' ', '');
        IF t ~ '^\d{1,20}(\.\d{1,20})?$' THEN
            n := t::numeric;
        ELSIF t <> '' THEN
            part := regexp_match(t, '^(?:(\d{1,20}(?:\.\d{1,20})?)d)?(?:(\d{1,20}(?:\.\d{1,20})?)h)?'
                || '(?:(\d{1,20}(?:\.\d{1,20})?)m)?(?:(\d{1,20}(?:\.\d{1,20})?)s)?(?:(\d{1,20}(?:\.\d{1,20})?)ms)?$');
            IF part IS NOT NULL THEN
                n := coalesce(part[1]::numeric, 0) * 86400 + coalesce(part[2]::numeric, 0) * 3600
                    + coalesce(part[3]::numeric, 0) * 60 + coalesce(part[4]::numeric, 0)
                    + coalesce(part[5]::numeric, 0) * 0.001;
            END IF;
        END IF;
    END IF;
    IF n IS NULL THEN
        PERFORM bsup.refuse(field, 'is not a duration', form);
    ELSIF n < 0 THEN
        PERFORM bsup.refuse(field, 'is negative', form);
    ELSIF n > 3650 * 86400 THEN
        PERFORM bsup.refuse(field, 'is not a duration of at most ten years', form);
    ELSIF n = 0 AND NOT zero THEN
        PERFORM bsup.refuse(field, 'must be more than zero', form);
    END IF;
    RETURN n::double precision;
END $$;

-- Bytes of a size: a whole number, or text like '512MiB', '1GB'. One letter alone is a power of 1024.
CREATE FUNCTION bsup.spec_size(obj jsonb, key text, field text) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v jsonb := bsup.spec_get(obj, key);
    form constant text := 'bytes as a whole number, or like "64KiB", "512MiB", "1GB"';
    part text[];
    n numeric;
BEGIN
    IF v IS NULL THEN
        RETURN NULL;
    END IF;
    IF jsonb_typeof(v) = 'number' THEN
        n := v::numeric;
        IF n <> trunc(n) THEN
            PERFORM bsup.refuse(field, 'is not a whole number of bytes', form);
        END IF;
    ELSIF jsonb_typeof(v) = 'string' THEN
        part := regexp_match(lower(btrim(v #>> '{}')), '^(\d{1,20}(?:\.\d{1,20})?)\s*([kmgt]?)(i?b)?$');
        IF part IS NULL OR (part[2] = '' AND part[3] = 'ib') THEN
            PERFORM bsup.refuse(field, 'is not a size', form);
        END IF;
        n := trunc(part[1]::numeric
                   * (CASE WHEN part[3] = 'b' THEN 1000 ELSE 1024 END)::numeric ^ (strpos('kmgt', nullif(part[2], ''))));
        n := coalesce(n, trunc(part[1]::numeric));
    ELSE
        PERFORM bsup.refuse(field, 'is not a size', form);
    END IF;
    IF n < 0 THEN
        PERFORM bsup.refuse(field, 'is negative', form);
    ELSIF n > 2::numeric ^ 62 THEN
        PERFORM bsup.refuse(field, 'is too large', form);
    END IF;
    RETURN n::bigint;
END $$;

-- A relative path that can't leave where it starts, without empty and `.` parts; '' is the start itself.
CREATE FUNCTION bsup.spec_path(path text, field text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    allowed constant text := 'a relative path without `..`';
    parts text[] := array_remove(array_remove(string_to_array(path, '/'), ''), '.');
BEGIN
    IF starts_with(path, '/') THEN
        PERFORM bsup.refuse(field, 'is an absolute path', allowed);
    ELSIF '..' = ANY (parts) THEN
        PERFORM bsup.refuse(field, 'leaves the workspace with `..`', allowed);
    ELSIF octet_length(path) > 3000 OR EXISTS (SELECT FROM unnest(parts) p WHERE octet_length(p) > 255) THEN
        PERFORM bsup.refuse(field, 'is too long for a path', allowed);
    END IF;
    RETURN array_to_string(parts, '/');
END $$;

CREATE FUNCTION bsup.spec_name(name text, field text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    stripped text := btrim(name, E' \t\r\n\f\v');
BEGIN
    IF stripped = '' THEN
        PERFORM bsup.refuse(field, 'is empty', '1 to 64 characters');
    ELSIF length(stripped) > 64 THEN
        PERFORM bsup.refuse(field, format('has %s characters', length(stripped)), '1 to 64 characters');
    ELSIF stripped ~ '[[:cntrl:]]' THEN
        PERFORM bsup.refuse(field, 'holds a character that can''t be printed', 'printable characters');
    END IF;
    RETURN stripped;
END $$;

CREATE FUNCTION bsup.spec_env_name(name text, field text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF name !~ '^[A-Za-z_][A-Za-z0-9_]{0,254}$' THEN
        PERFORM bsup.refuse(field, 'is not a name of an environment variable',
                            'letters, digits and _, not beginning with a digit');
    ELSIF name = 'BSUP' OR starts_with(name, 'BSUP_') THEN
        PERFORM bsup.refuse(field, 'is set by bsup itself', 'names that do not begin with BSUP_');
    END IF;
END $$;

-- The list of texts at a key, or null.
CREATE FUNCTION bsup.spec_texts(obj jsonb, key text, field text) RETURNS text[]
LANGUAGE plpgsql AS $$
DECLARE
    v jsonb := bsup.spec_get(obj, key);
    i bigint;
BEGIN
    IF v IS NULL THEN
        RETURN NULL;
    END IF;
    IF jsonb_typeof(v) <> 'array' THEN
        PERFORM bsup.refuse(field, 'is not a list', 'a list of texts');
    END IF;
    SELECT ord - 1 INTO i FROM jsonb_array_elements(v) WITH ORDINALITY AS e(item, ord)
    WHERE jsonb_typeof(item) <> 'string' LIMIT 1;
    IF FOUND THEN
        PERFORM bsup.refuse(format('%s[%s]', field, i), 'is not text', 'text');
    END IF;
    RETURN ARRAY(SELECT jsonb_array_elements_text(v));
END $$;

-- A mapping of names of environment variables to texts (numbers become text where they are allowed).
CREATE FUNCTION bsup.spec_env(v jsonb, field text, secret boolean) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    k text;
    item jsonb;
    canonical jsonb := '{}';
BEGIN
    PERFORM bsup.spec_object(v, field, NULL, 'a mapping of names to values');
    FOR k, item IN SELECT * FROM jsonb_each(v) LOOP
        PERFORM bsup.spec_env_name(k, field || '.' || left(k, 80));
        IF jsonb_typeof(item) <> 'string' AND (secret OR jsonb_typeof(item) <> 'number') THEN
            PERFORM bsup.refuse(field || '.' || left(k, 80), 'is not text',
                                CASE WHEN secret THEN 'text; put a number in quotes'
                                     ELSE 'text or a number; write "true" in quotes' END);
        ELSIF secret AND item #>> '{}' = '' THEN
            PERFORM bsup.refuse(field || '.' || left(k, 80), 'is empty', 'text of one or more characters');
        END IF;
        canonical := canonical || jsonb_build_object(k, item #>> '{}');
    END LOOP;
    RETURN canonical;
END $$;
