-- What SQL alone can't compute: see statistics.py.

-- Purities with slides drawn anew (scheme 'bootstrap') and with labels permuted ('all': over all
-- labelled tiles; 'within_slides': among each slide's). See statistics.py, which computes them.
CREATE TABLE purity_replicates (
    scheme         VARCHAR,
    k              INTEGER,
    replicate      INTEGER,
    cluster        INTEGER,
    labelled_tiles INTEGER,
    purity         DOUBLE      -- NULL where a replicate has no labelled tile in the cluster
);

CREATE TABLE statistics (      -- one row
    state           VARCHAR,   -- current; stale: of other data, so not used; missing
    replicates      INTEGER,
    seed            INTEGER,
    labelled_slides INTEGER,
    labelled_tiles  INTEGER,
    fingerprint     VARCHAR
);
