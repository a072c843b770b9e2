-- oldest: 3
-- Checks a whole spec, with the checks of single values of the file before.

CREATE FUNCTION bsup.spec_step(raw jsonb, field text) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    run jsonb := bsup.spec_get(raw, 'run');
    words text[];
    step jsonb;
    dir text;
    seconds double precision;
BEGIN
    IF jsonb_typeof(raw) = 'object' AND raw ? 'image' THEN
        PERFORM bsup.refuse(field || '.image', 'container steps are not supported by this version',
                            'remove `image` to run the step as a process');
    END IF;
    PERFORM bsup.spec_object(raw, field, '{always,dir,env,name,run,timeout}');
    IF bsup.spec_get(raw, 'name') IS NULL THEN
        PERFORM bsup.refuse(field || '.name', 'is missing', 'every step has `name` and `run`');
    ELSIF run IS NULL THEN
        PERFORM bsup.refuse(field || '.run', 'is missing', 'every step has `name` and `run`');
    END IF;
    step := jsonb_build_object('name', bsup.spec_name(bsup.spec_text(raw, 'name', field || '.name'), field || '.name'),
                               'run', run);
    IF jsonb_typeof(run) = 'string' THEN
        words := ARRAY[run #>> '{}'];
    ELSIF jsonb_typeof(run) = 'array' THEN
        words := bsup.spec_texts(raw, 'run', field || '.run');
    ELSE
        PERFORM bsup.refuse(field || '.run', 'is not a list or text', 'a list like ["echo", "hi"], or a text for sh -c');
    END IF;
    IF coalesce(btrim(words[1], E' \t\r\n\f\v'), '') = '' THEN
        PERFORM bsup.refuse(field || '.run', 'is empty', 'a list like ["echo", "hi"], or a text for sh -c');
    END IF;
    dir := bsup.spec_path(bsup.spec_text(raw, 'dir', field || '.dir'), field || '.dir');
    IF dir <> '' THEN
        step := step || jsonb_build_object('dir', dir);
    END IF;
    IF bsup.spec_get(raw, 'env') IS NOT NULL THEN
        step := step || jsonb_build_object('env', nullif(bsup.spec_env(raw -> 'env', field || '.env', false), '{}'));
    END IF;
    seconds := bsup.spec_duration(raw, 'timeout', field || '.timeout', false);
    IF seconds IS NOT NULL THEN
        step := step || jsonb_build_object('timeout', seconds);
    END IF;
    IF bsup.spec_bool(raw, 'always', field || '.always') THEN
        step := step || '{"always": true}';
    END IF;
    RETURN jsonb_strip_nulls(step);
END $$;

CREATE FUNCTION bsup.spec_url(url text, field text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    allowed constant text :=
        'http://, https://, ssh://, git:// or file:// URLs, user@host:path, absolute paths';
    part text[];
    authority text;
BEGIN
    IF url = '' OR length(url) > 2048 OR starts_with(url, '-') OR url ~ '[[:space:][:cntrl:]\\]' THEN
        PERFORM bsup.refuse(field, 'is not a git URL', allowed);
    ELSIF url ~* '(^|[/:])(\.|%2e){2}(/|$)' THEN
        PERFORM bsup.refuse(field, 'holds `..`', allowed);
    END IF;
    IF starts_with(url, '/') THEN
        RETURN 'path';
    END IF;
    part := regexp_match(url, '^([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(.*)$');
    IF part IS NULL THEN
        IF strpos(url, '::') = 0 AND url ~ '^([A-Za-z0-9._-]+@)?[A-Za-z0-9][A-Za-z0-9.-]*:(?!//).+$' THEN
            RETURN 'ssh';
        END IF;
        PERFORM bsup.refuse(field, 'is not a git URL', allowed);
    END IF;
    part[1] := lower(part[1]);
    authority := part[2];
    IF part[1] <> ALL ('{http,https,ssh,git,file}') THEN
        PERFORM bsup.refuse(field, format('has the scheme ''%s''', left(part[1], 20)), allowed);
    ELSIF authority ~ ':.*@' OR (part[1] IN ('http', 'https') AND authority ~ '@') THEN
        PERFORM bsup.refuse(field, 'holds a user or password',
                            'put the password in `secrets` and name it in `repository.credential`');
    ELSIF part[1] = 'file' AND (authority NOT IN ('', 'localhost') OR NOT starts_with(part[3], '/')) THEN
        PERFORM bsup.refuse(field, 'is not the URL of a local path', 'file:///path');
    ELSIF part[1] <> 'file' AND authority !~ '^([^@]*@)?(\[[0-9A-Fa-f:.]+\]|[^-:@\[\]][^:@\[\]]*)(:\d{0,5})?$' THEN
        PERFORM bsup.refuse(field, 'names no host', allowed);
    ELSIF part[1] <> 'file' AND length(part[3]) < 2 THEN
        PERFORM bsup.refuse(field, 'names no repository', allowed);
    END IF;
    RETURN part[1];
END $$;

CREATE FUNCTION bsup.spec_repository(raw jsonb, secrets jsonb) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    repository jsonb;
    scheme text;
    rev text;
    t text;
    v jsonb;
    paths text[];
BEGIN
    PERFORM bsup.spec_object(raw, 'repository', '{commit,credential,depth,filter,sparse,submodules,url}');
    IF bsup.spec_get(raw, 'url') IS NULL THEN
        PERFORM bsup.refuse('repository.url', 'is missing', 'a git URL or an absolute path');
    ELSIF bsup.spec_get(raw, 'commit') IS NULL THEN
        PERFORM bsup.refuse('repository.commit', 'is missing', 'a commit''s id, a branch or a tag');
    END IF;
    t := bsup.spec_text(raw, 'url', 'repository.url');
    scheme := bsup.spec_url(t, 'repository.url');
    rev := bsup.spec_text(raw, 'commit', 'repository.commit');
    IF btrim(rev) = '' THEN
        PERFORM bsup.refuse('repository.commit', 'is empty', 'a commit''s id, a branch or a tag');
    ELSIF starts_with(rev, '-') OR length(rev) > 512 OR rev ~ '[[:space:][:cntrl:]:?*\[\\]|\.\.' THEN
        PERFORM bsup.refuse('repository.commit', 'is not a revision', 'a commit''s id, a branch or a tag');
    END IF;
    repository := jsonb_build_object(
        'url', t, 'commit', rev,
        'depth', bsup.spec_number(raw, 'depth', 'repository.depth', 1, 2147483647, true));
    t := bsup.spec_text(raw, 'filter', 'repository.filter');
    IF t !~ '^(blob:none|blob:limit=\d{1,15}[kmg]?|tree:\d{1,9})$' THEN
        PERFORM bsup.refuse('repository.filter', 'is not a filter for a partial clone',
                            'blob:none, blob:limit=<size>, tree:<depth>');
    END IF;
    repository := repository || jsonb_build_object('filter', t);
    paths := bsup.spec_texts(raw, 'sparse', 'repository.sparse');
    paths := ARRAY(SELECT DISTINCT p COLLATE "C" FROM (
        SELECT bsup.spec_path(s, format('repository.sparse[%s]', ord - 1)) FROM unnest(paths) WITH ORDINALITY u(s, ord)
    ) c(p) WHERE p <> '' ORDER BY 1);
    IF cardinality(paths) > 0 THEN
        repository := repository || jsonb_build_object('sparse', paths);
    END IF;
    v := bsup.spec_get(raw, 'submodules');
    IF v NOT IN ('true', 'false', '"recursive"') THEN
        PERFORM bsup.refuse('repository.submodules', 'is not known', 'true, false or "recursive"');
    END IF;
    repository := repository || jsonb_build_object('submodules', nullif(v, 'false'));
    v := bsup.spec_get(raw, 'credential');
    IF v IS NOT NULL THEN
        PERFORM bsup.spec_object(v, 'repository.credential', '{secret,username}');
        t := bsup.spec_text(v, 'secret', 'repository.credential.secret');
        IF scheme NOT IN ('http', 'https') THEN
            PERFORM bsup.refuse('repository.credential', 'needs an http or https URL', 'http://…, https://…');
        ELSIF t IS NULL OR NOT coalesce(secrets ? t, false) THEN
            PERFORM bsup.refuse('repository.credential.secret', 'is not the name of one of the job''s secrets',
                                'a name in `secrets`');
        END IF;
        rev := bsup.spec_text(v, 'username', 'repository.credential.username');
        IF rev = '' OR rev ~ '[[:cntrl:]]' THEN
            PERFORM bsup.refuse('repository.credential.username', 'is not a user''s name', 'printable text');
        END IF;
        repository := repository || jsonb_build_object(
            'credential', jsonb_build_object('secret', t, 'username', nullif(rev, 'git')));
    END IF;
    RETURN jsonb_strip_nulls(repository);
END $$;

CREATE FUNCTION bsup.spec_files(raw jsonb) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    path text;
    above text;
    content jsonb;
    canonical text;
    field text;
    paths text[] := '{}';
    contents jsonb[] := '{}';
BEGIN
    PERFORM bsup.spec_object(raw, 'files', NULL, 'a mapping of paths to contents');
    IF (SELECT count(*) FROM jsonb_object_keys(raw)) > 4096 THEN
        PERFORM bsup.refuse('files', 'has too many files', 'at most 4096');
    END IF;
    FOR path, content IN SELECT * FROM jsonb_each(raw) LOOP
        field := format('files[''%s'']', left(path, 200));
        IF jsonb_typeof(content) <> 'string' THEN
            PERFORM bsup.refuse(field, 'has a content that is not text', 'text');
        ELSIF path LIKE '_%/' THEN
            PERFORM bsup.refuse(field, 'names a directory', 'the path of a file');
        END IF;
        canonical := bsup.spec_path(path, field);
        IF canonical = '' THEN
            PERFORM bsup.refuse(field, 'names no file', 'a relative path without `..`');
        END IF;
        paths := paths || canonical;
        contents := contents || content;
    END LOOP;
    SELECT p INTO path FROM unnest(paths) p GROUP BY p HAVING count(*) > 1 LIMIT 1;
    IF FOUND THEN
        PERFORM bsup.refuse(format('files[''%s'']', left(path, 200)), 'is given twice', 'one content for each file');
    END IF;
    SELECT p, prefix INTO path, above
    FROM unnest(paths) p
    CROSS JOIN LATERAL string_to_array(p, '/') AS parts
    CROSS JOIN LATERAL generate_series(1, cardinality(parts) - 1) AS depth
    CROSS JOIN LATERAL array_to_string(parts[1:depth], '/') AS prefix
    JOIN unnest(paths) other ON other = prefix
    LIMIT 1;
    IF FOUND THEN
        PERFORM bsup.refuse(format('files[''%s'']', left(path, 200)),
                            format('lies below ''%s'', which is a file', left(above, 200)),
                            'a relative path without `..`');
    END IF;
    RETURN coalesce((SELECT jsonb_object_agg(p, c) FROM unnest(paths, contents) AS f(p, c)), '{}');
END $$;

-- The canonical spec, with the values of its secrets: keys in the job file's words, defaults left out.
CREATE FUNCTION bsup.normalize(raw jsonb) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    job jsonb;
    steps jsonb := '[]';
    step jsonb;
    seen text[] := '{}';
    labels text[];
    secrets jsonb := bsup.spec_get(raw, 'secrets');
    redact jsonb := bsup.spec_get(raw, 'redact');
    repository jsonb := bsup.spec_get(raw, 'repository');
    files jsonb := bsup.spec_get(raw, 'files');
    name text;
    v jsonb;
    i integer := 0;
BEGIN
    IF jsonb_typeof(raw) IS DISTINCT FROM 'object' THEN
        PERFORM bsup.refuse('job', 'is not a mapping of keys to values', 'an object');
    ELSIF octet_length(raw::text) > 16777216 THEN
        PERFORM bsup.refuse('job', 'is too large', 'at most 16 MiB');
    END IF;
    IF bsup.spec_get(raw, 'kind') IS NULL THEN
        PERFORM bsup.refuse('kind', 'is missing', 'steps');
    ELSIF bsup.spec_text(raw, 'kind', 'kind') <> 'steps' THEN
        PERFORM bsup.refuse('kind', format('there is no kind ''%s''', left(raw ->> 'kind', 64)), 'steps');
    END IF;
    PERFORM bsup.spec_object(raw, '', '{attempts,backoff,cpu,files,keep_workspace,kind,labels,memory,name,priority,redact,'
                                      'repository,secrets,steps,timeout}');
    v := bsup.spec_get(raw, 'steps');
    IF v IS NULL THEN
        PERFORM bsup.refuse('steps', 'is missing', 'a list of steps, each with `name` and `run`');
    ELSIF jsonb_typeof(v) <> 'array' THEN
        PERFORM bsup.refuse('steps', 'is not a list', 'a list of steps, each with `name` and `run`');
    ELSIF jsonb_array_length(v) NOT BETWEEN 1 AND 256 THEN
        PERFORM bsup.refuse('steps', format('has %s steps', jsonb_array_length(v)), '1 to 256 steps');
    END IF;
    FOR step IN SELECT jsonb_array_elements(v) LOOP
        step := bsup.spec_step(step, format('steps[%s]', i));
        IF step ->> 'name' = ANY (seen) THEN
            PERFORM bsup.refuse(format('steps[%s].name', i),
                                format('''%s'' is the name of an earlier step too', step ->> 'name'), 'names that differ');
        END IF;
        seen := seen || (step ->> 'name');
        steps := steps || jsonb_build_array(step);
        i := i + 1;
    END LOOP;
    secrets := CASE WHEN secrets IS NOT NULL THEN nullif(bsup.spec_env(secrets, 'secrets', true), '{}') END;
    IF redact IS NOT NULL THEN
        PERFORM bsup.spec_object(redact, 'redact', NULL, 'a mapping of values to replacements');
        IF redact ? '' THEN
            PERFORM bsup.refuse('redact', 'holds an empty value', 'values of one or more characters');
        ELSIF EXISTS (SELECT FROM jsonb_each(redact) e WHERE jsonb_typeof(e.value) <> 'string') THEN
            PERFORM bsup.refuse('redact', 'holds a replacement that is not text', 'text');
        END IF;
    END IF;
    repository := CASE WHEN repository IS NOT NULL THEN bsup.spec_repository(repository, secrets) END;
    files := CASE WHEN files IS NOT NULL THEN nullif(bsup.spec_files(files), '{}') END;
    IF (repository IS NOT NULL OR files IS NOT NULL) AND 'checkout' = ANY (seen) THEN
        PERFORM bsup.refuse(format('steps[%s].name', array_position(seen, 'checkout') - 1),
                            '''checkout'' is bsup''s own first step of this job', 'another name');
    END IF;
    labels := bsup.spec_texts(raw, 'labels', 'labels');
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
    name := bsup.spec_name(bsup.spec_text(raw, 'name', 'name'), 'name');
    IF name IS NULL AND repository IS NOT NULL THEN
        name := btrim(regexp_replace(regexp_replace(rtrim(repository ->> 'url', '/'), '^.*[/:]', ''), '\.git$', ''));
        name := nullif(btrim(left(name, 64)), '');
    END IF;
    job := jsonb_build_object(
        'kind', 'steps', 'name', coalesce(name, seen[1]), 'steps', steps, 'repository', repository,
        'labels', nullif(to_jsonb(labels), '[]'),
        'priority', nullif(bsup.spec_number(raw, 'priority', 'priority', 0, 255, true), 127),
        'timeout', bsup.spec_duration(raw, 'timeout', 'timeout', false),
        'attempts', nullif(bsup.spec_number(raw, 'attempts', 'attempts', 1, 1000, true), 1),
        'backoff', nullif(bsup.spec_duration(raw, 'backoff', 'backoff', true), 10),
        'cpu', nullif(bsup.spec_number(raw, 'cpu', 'cpu', 0, 4096, false), 0),
        'memory', nullif(bsup.spec_size(raw, 'memory', 'memory'), 0),
        'keep_workspace', nullif(bsup.spec_bool(raw, 'keep_workspace', 'keep_workspace'), false),
        'secrets', secrets, 'redact', nullif(redact, '{}'), 'files', files);
    IF (job ->> 'backoff')::double precision > 600 THEN
        PERFORM bsup.refuse('backoff', 'is too long', 'at most 600 seconds');
    END IF;
    RETURN jsonb_strip_nulls(job);
END $$;
