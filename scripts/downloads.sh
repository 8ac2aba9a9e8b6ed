# Sourced by scripts that download. uv and pip bring authorities of their own along; a company's TLS proxy is not among them, but
# the system trusts it. So they use the system's, where it has any, unless they are told otherwise.
for bundle in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem; do
    [ -f "$bundle" ] || continue
    export PIP_CERT="${PIP_CERT:-${SSL_CERT_FILE:-$bundle}}"
    if [ -z "${UV_SYSTEM_CERTS:-}${UV_NATIVE_TLS:-}" ]; then
        export UV_SYSTEM_CERTS=true UV_NATIVE_TLS=true # the names since uv 0.9, and before
    fi
    break
done
