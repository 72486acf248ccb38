-- What the stream's revision of an exchange said that it costs, whatever operators gave back:
-- the next one takes from the balance what it charges beyond that.
alter table usage_revisions add column told_ucr bigint,
    add check ((told_ucr is null) = (revision is null));
