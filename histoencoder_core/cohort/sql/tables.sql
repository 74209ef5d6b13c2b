-- The catalog's tables. Rows come from each slide's files; nothing here reads a file itself, so that
-- queries can run with file access off.

CREATE TABLE slides (
    slide           VARCHAR PRIMARY KEY,
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
    black_pixels  FLOAT,
    white_pixels  FLOAT,
    laplacian_std FLOAT,       -- sharpness
    gray_mean     FLOAT,
    saturation_mean FLOAT
);

CREATE TABLE clusters (
    slide   VARCHAR,
    tile    VARCHAR,
    k       INTEGER,           -- number of clusters of the model
    cluster INTEGER,
    model   VARCHAR,
    current BOOLEAN,           -- assigned with the cohort's current model
    untrained BOOLEAN          -- random weights are behind it
);

CREATE TABLE labels (
    slide VARCHAR,
    tile  VARCHAR,
    label VARCHAR,
    share FLOAT                -- share of the tile that the label covers
);

CREATE TABLE completeness (
    slide  VARCHAR,
    stage  VARCHAR,
    state  VARCHAR,            -- done, empty, input, failed, stale, missing, not due
    reason VARCHAR
);

CREATE TABLE model (
    version   VARCHAR,
    encoder   VARCHAR,
    untrained BOOLEAN,
    slides    INTEGER,
    tiles     INTEGER
);
