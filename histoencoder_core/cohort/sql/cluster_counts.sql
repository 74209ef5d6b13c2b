-- Count the tiles of slides that come in: the table "incoming" has the columns of "tiles".

INSERT INTO cluster_counts
SELECT slide, k, cluster, label, tiles FROM cluster_counts WHERE false
-- for each k
UNION ALL
SELECT slide, ${k}, k${k}::INTEGER, label, count(*)::INTEGER
FROM incoming
WHERE k${k} IS NOT NULL
GROUP BY slide, k${k}, label
-- end
ORDER BY slide, k, cluster, label;
