-- The catalog's tables. Rows come from each slide's files; nothing here reads a file itself, so that
-- queries can run with file access off. Lines between "for each k" and "end" are repeated for each
-- number of clusters of the current model.

CREATE TABLE slides (
    slide           VARCHAR,
    file            VARCHAR,   -- path relative to the folder the slide was found in
    vendor          VARCHAR,
    objective_power DOUBLE,
    width           INTEGER,   -- level-0 pixels
    height          INTEGER,
    levels          INTEGER,
    mpp             DOUBLE,    -- µm/px at level 0
    mpp_source      VARCHAR,   -- 'slide' or 'slides.csv'
    patient         VARCHAR,   -- from slides.csv, as are the four below
    site            VARCHAR,
    scanner         VARCHAR,
    stain           VARCHAR,
    split           VARCHAR,
    tiles           INTEGER,
    labelled_tiles  INTEGER,
    encoder         VARCHAR,
    untrained       BOOLEAN,   -- random weights are behind this slide's features
    model           VARCHAR    -- version of the cluster model it is assigned with
);

CREATE TABLE tiles (
    slide         VARCHAR,
    tile          VARCHAR,     -- the tile's name, unique within its slide
    x             INTEGER,     -- level-0 pixels
    y             INTEGER,
    w             INTEGER,
    h             INTEGER,
    level         INTEGER,     -- pyramid level read
    mpp           DOUBLE,      -- achieved µm/px
    background    FLOAT,       -- share of the tile that is no tissue
    ink           FLOAT,       -- share that is ink of pens or dye; NULL for fluorescence, and for
                               -- tiles cut before ink was looked for, as are blank and blur
    blank         FLOAT,       -- share that is neither tissue nor ink
    blur          FLOAT,       -- 0 sharp to 1 blurred
    black_pixels  FLOAT,
    white_pixels  FLOAT,
    laplacian_std FLOAT,       -- sharpness
    gray_mean     FLOAT,
    saturation_mean FLOAT,
    label         VARCHAR,     -- what people say of it
    label_share   FLOAT        -- share of its tissue that the label covers
    -- for each k
    , k${k}       ${type}      -- its cluster among K, by the current model
    -- end
);

CREATE TABLE other_clusters (  -- of another model than the current one, or of another program
    slide     VARCHAR,
    tile      VARCHAR,
    k         INTEGER,
    cluster   INTEGER,
    model     VARCHAR,
    untrained BOOLEAN,
    label     VARCHAR
);

-- Nearly everything about clusters is computed from this one. Only clusters of the current model are
-- counted.
CREATE TABLE cluster_counts (
    slide   VARCHAR,
    k       INTEGER,
    cluster INTEGER,
    label   VARCHAR,           -- NULL for tiles without a label
    tiles   INTEGER
);

CREATE TABLE completeness (
    slide  VARCHAR,
    stage  VARCHAR,
    state  VARCHAR,            -- done, empty, input, duplicate, waiting, failed, stale, missing, not due
    reason VARCHAR,
    kind   VARCHAR             -- of a failure
);

CREATE TABLE absent (          -- slides whose file is gone; their results are kept
    slide VARCHAR,
    since TIMESTAMP WITH TIME ZONE
);

CREATE TABLE model (           -- the current one, if there is one
    version   VARCHAR,
    encoder   VARCHAR,
    untrained BOOLEAN,
    slides    INTEGER,
    tiles     INTEGER
);

CREATE TABLE models (          -- all that were ever fitted
    version    VARCHAR,
    current    BOOLEAN,
    encoder    VARCHAR,
    untrained  BOOLEAN,
    slides     INTEGER,        -- it was fitted on
    tiles      INTEGER,
    n_clusters INTEGER[],
    seed       INTEGER,
    previous   VARCHAR         -- version whose clusters its own were matched with
);

CREATE TABLE cluster_matches ( -- which cluster was which before a refit, and how far it moved
    model            VARCHAR,
    previous         VARCHAR,
    k                INTEGER,
    cluster          INTEGER,
    previous_cluster INTEGER,
    moved            DOUBLE,   -- distance of the centroids
    moved_relative   DOUBLE,
    same             BOOLEAN
);

CREATE TABLE slide_distance (  -- does a slide lie where the model was fitted?
    slide   VARCHAR,
    k       INTEGER,
    median  DOUBLE,            -- distance of a tile to its centroid
    outside DOUBLE             -- share of tiles farther away than 99 % of the tiles fitted on
);

CREATE SCHEMA internal;

CREATE TABLE internal.sources ( -- what each slide's rows were made from, so that changes are told
    slide       VARCHAR,
    files       VARCHAR,       -- see changes.Signature
    images      VARCHAR,
    own_tiles   BOOLEAN,       -- see changes.Known
    path        VARCHAR,
    clusters    VARCHAR,       -- fingerprint of its clusters
    counted     VARCHAR,       -- fingerprints of its clusters and labels, if both count
    annotations VARCHAR        -- stamp of its annotation by cluster
);

CREATE TABLE internal.state (  -- one row
    made_for       VARCHAR,    -- all that calls for a new catalog when it changes, as JSON
    models         VARCHAR[],  -- versions that are there
    cluster_labels VARCHAR,    -- fingerprint of what clusters mean
    statistics     VARCHAR,    -- of the statistics that are there
    arrived        VARCHAR,    -- of files that are no slides yet, or not any more
    bytes          BIGINT      -- size of the file when it was last written from scratch
);
