# Sourced by package.sh and portable.sh: archives that are the same in every build.

# pack DIRECTORY NAME: writes DIRECTORY/NAME as a compressed tar to the standard output, with $SOURCE_DATE_EPOCH as every time.
pack() {
    tar -c -C "$1" --sort=name --format=gnu --owner=0 --group=0 --numeric-owner --mode=u+rwX,go+rX,go-w \
        --mtime="@$SOURCE_DATE_EPOCH" "$2" | gzip -9n
}
