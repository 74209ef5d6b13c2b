-- How pure each cluster is in its most frequent label. Purity is the share of the cluster's labelled
-- tiles that carry the label; a cluster without labelled tiles has none. Only slides assigned with
-- the current model count.

CREATE TABLE cluster_purity AS
WITH current_clusters AS (
    SELECT * FROM clusters WHERE current
),
size AS (
    SELECT k, cluster, count(*) AS tiles, count(DISTINCT slide) AS slides
    FROM current_clusters
    GROUP BY k, cluster
),
per_label AS (
    SELECT k, cluster, label, count(*) AS tiles
    FROM current_clusters JOIN labels USING (slide, tile)
    GROUP BY k, cluster, label
),
ranked AS (
    SELECT
        *,
        sum(tiles) OVER of_cluster AS labelled_tiles,
        row_number() OVER (PARTITION BY k, cluster ORDER BY tiles DESC, label) AS place,
        -sum(tiles / total * ln(tiles / total)) OVER of_cluster AS entropy
    FROM (SELECT *, sum(tiles) OVER (PARTITION BY k, cluster) AS total FROM per_label)
    WINDOW of_cluster AS (PARTITION BY k, cluster)
)
SELECT
    size.k,
    size.cluster,
    size.tiles,
    size.slides,
    coalesce(ranked.labelled_tiles, 0)::BIGINT AS labelled_tiles,
    ranked.label,
    ranked.tiles / ranked.labelled_tiles AS purity,
    abs(ranked.entropy) AS entropy,
    model.version AS model,
    model.encoder,
    model.untrained
FROM size
LEFT JOIN ranked ON size.k = ranked.k AND size.cluster = ranked.cluster AND ranked.place = 1
CROSS JOIN model
ORDER BY size.k, size.cluster;
