-- What share of a slide's tiles lies in each cluster. Clusters a slide has no tiles in have no row.

CREATE TABLE slide_composition AS
SELECT
    slide,
    k,
    cluster,
    count(*) AS tiles,
    count(*) / sum(count(*)) OVER (PARTITION BY slide, k) AS share,
    bool_or(untrained) AS untrained
FROM clusters
WHERE current
GROUP BY slide, k, cluster
ORDER BY slide, k, cluster;
